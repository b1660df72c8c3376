"""Samples: decoded images with their captions, by position in the corpus."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from memtrain.data.shards import Extent, find_shards, index_shard

log = logging.getLogger(__name__)


class BadSample(Exception):
    """A sample that cannot be decoded; says why."""


def decode_image(data: bytes, resolution: int) -> np.ndarray:
    """Bytes of a picture -> (3, R, R) uint8: upright by EXIF, alpha on white, short side to R, centre crop.

    Raises:
        BadSample: the bytes are not a whole picture, or one of more than 179 million pixels (Pillow's cap).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and large pictures it then decodes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image = ImageOps.exif_transpose(image)
            image = _to_rgb(image)
    except Exception as error:  # Pillow's plugins raise nearly anything on broken bytes
        raise BadSample(f"image cannot be decoded ({type(error).__name__})") from error
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips instead of scaling
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


class ShardSamples:
    """The samples of LAION-style shards, in shard order, decoded when asked for.

    Indexes every shard on construction (headers alone); what cannot be used is counted and named in the log.

    Args:
        shards: see `memtrain.data.shards.find_shards`.
        resolution: side of the decoded square, px.
    """

    def __init__(self, shards: str | list[str], resolution: int):
        self.resolution = resolution
        self.paths = find_shards(shards)
        self.root = Path(os.path.commonpath([path.absolute().parent for path in self.paths]))
        self.entries: list[tuple[int, str, Extent, Extent]] = []
        self.skipped: list[tuple[str, str]] = []
        for number, path in enumerate(self.paths):
            index = index_shard(path)
            self.entries += [(number, entry.key, entry.image, entry.caption) for entry in index.entries]
            self.skipped += [(f"{self._shard_name(number)}/{key}", why) for key, why in index.skipped]
        for name, why in self.skipped:
            log.warning("skipped %s: %s", name, why)
        if not self.entries:
            causes = Counter(why for _, why in self.skipped).most_common(1)
            why = f" ({causes[0][0]})" if causes else ""
            raise ValueError(f"data.shards={shards}: no sample with an image and a caption in it{why}")
        log.info("%d samples in %d shards, %d skipped", len(self), len(self.paths), len(self.skipped))

    def _shard_name(self, number: int) -> str:
        return self.paths[number].absolute().relative_to(self.root).as_posix()

    def __len__(self) -> int:
        return len(self.entries)

    def key(self, index: int) -> str:
        """Shard path, relative to the shards' common folder, and `__key__`: who a sample is."""
        shard, key, _, _ = self.entries[index]
        return f"{self._shard_name(shard)}/{key}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        """Image (3, R, R) uint8 and caption. Raises BadSample."""
        shard, _, image, caption = self.entries[index]
        try:
            with self.paths[shard].open("rb") as file:
                image_bytes, caption_bytes = _read(file, image), _read(file, caption)
        except OSError as error:
            raise BadSample(f"shard cannot be read ({error})") from error
        text = caption_bytes.decode("utf-8", errors="replace").strip()
        return decode_image(image_bytes, self.resolution), text


def _read(file: io.BufferedReader, extent: Extent) -> bytes:
    file.seek(extent.offset)
    return file.read(extent.size)
