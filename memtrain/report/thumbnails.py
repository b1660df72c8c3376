"""Pictures for the page, as data URIs: training samples by key, and what the run drew itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memtrain.data.foreign import is_foreign
from memtrain.data.images import BadSample
from memtrain.data.remote import ShardMissing
from memtrain.data.samples import ShardSamples
from memtrain.data.sources import find_sources

SIDE = 128  # px, of a thumbnail


def jpeg(image: Image.Image, side: int, quality: int = 82) -> str:
    """A data URI of the picture, scaled down to at most `side` px."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_of(path: Path, side: int = 1400) -> str | None:
    """A picture file of the run's folder as a data URI; None where it is missing, or being written."""
    try:
        with Image.open(path) as image:
            return jpeg(image, side)
    except (OSError, Image.DecompressionBombError):
        return None


def samples_by_key(config: dict[str, Any], keys: Sequence[str]) -> tuple[dict[str, tuple[str, str]], str | None]:
    """Data URI and caption of each sample that can still be read, and a remark where some cannot.

    Nothing is fetched: remote shards are left where they are.
    """
    data = config.get("data", {})
    keys = [key for key in keys if not is_foreign(key)]  # in no shard
    if not keys:
        return {}, None
    if "shards" not in data:
        return {}, "Without pictures: the run did not train on shards."
    try:
        if any(shard.is_remote for shard in find_sources(data["shards"])):
            return {}, "Without pictures: the shards are remote, and the report fetches nothing."
        samples = ShardSamples(
            data["shards"],
            data["resolution"],
            data["caption"],
            data.get("where"),
            data.get("cache_dir"),
            missing_shards="skip",
            max_aspect_ratio=data.get("max_aspect_ratio", 1.0),
            bucket_multiple=data.get("bucket_multiple", 64),
        )
    except (ValueError, OSError, ShardMissing) as error:
        return {}, f"Without pictures: the shards cannot be opened any more ({error})."
    found: dict[str, tuple[str, str]] = {}
    for key in keys:
        try:
            position = int(samples.find([key])[0])
            pixels, caption, _ = samples.get(position, size=samples.size_of(position))
        except (ValueError, BadSample):  # another corpus by now, or damaged
            continue
        pixels = pixels.transpose(1, 2, 0)  # (3, h, w) -> (h, w, 3)
        found[key] = jpeg(Image.fromarray(np.ascontiguousarray(pixels)), SIDE), caption
    missing = len(keys) - len(found)
    return found, f"{missing} of {len(keys)} pictures could not be read from the shards." if missing else None
