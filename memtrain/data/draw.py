"""Draw a small corpus from a large one, by seed: the same samples, byte for byte, in shards of their own."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from memtrain.core.files import written_aside
from memtrain.core.streams import Stream
from memtrain.data.columns import parse_json
from memtrain.data.escaping import as_text
from memtrain.data.groups import stream_generator
from memtrain.data.images import BadSample
from memtrain.data.pack import ROW_DIGITS, SHARD_DIGITS
from memtrain.data.paths import check_empty
from memtrain.data.samples import ShardSamples

_FEW_SHARDS = 16
_SPARE = 2  # the shards that are drawn from hold so many times the samples that are wanted


def draw(
    samples: ShardSamples,
    out: Path,
    count: int,
    seed: int,
    shard_size: int = 10_000,
    progress: Callable[[Iterable, int], Iterable] = lambda rows, count: rows,
) -> int:
    """Write `count` samples, drawn without repetition, as shards to the folder `out`; it appears when all are whole.

    Which they are depends on (seed, corpus) alone. Samples that cannot be decoded are passed over for others. Pictures
    and captions are copied as they are; keys are new, as samples of several shards may have the same.

    Args:
        progress: wraps the positions and their number.

    Returns:
        How many samples were passed over.

    Raises:
        ValueError: `out` is not empty, a number is out of range, or the corpus holds too few samples.
    """
    for name, value in (("--count", count), ("--shard-size", shard_size)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    check_empty(out)
    order = _order(samples.counts, count, seed)
    chosen: list[int] = []
    passed = 0
    for position in progress(order.tolist(), count):
        if len(chosen) == count:
            break
        try:
            samples.get(position)
            chosen.append(position)
        except BadSample:
            passed += 1
    if len(chosen) < count:
        raise ValueError(f"--count={count}: the corpus has {len(chosen)} samples that can be read; lower it")
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    digits = max(ROW_DIGITS, len(str(shard_size - 1)))
    with written_aside(out, shared=True) as aside:
        aside.mkdir()
        for number, first in enumerate(range(0, count, shard_size)):
            with (aside / f"{number:0{SHARD_DIGITS}d}.tar").open("wb") as file, TarWriter(file, mtime=0) as tar:
                for row, position in enumerate(chosen[first : first + shard_size]):
                    key = f"{number * 10**digits + row:0{SHARD_DIGITS + digits}d}"
                    tar.write({"__key__": key, **_members(samples, position)})
    return passed


def _order(counts: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions in the order in which they are drawn: of a few shards, so that few are read, but of all of few."""
    generator = stream_generator(seed, Stream.DRAWN)
    shards, starts = generator.permutation(len(counts)), counts.cumsum() - counts
    enough = int(np.searchsorted(counts[shards].cumsum(), _SPARE * count)) + 1
    homes = shards[: max(_FEW_SHARDS, enough)]
    return generator.permutation(np.concatenate([np.arange(starts[s], starts[s] + counts[s]) for s in homes]))


def _members(samples: ShardSamples, position: int) -> dict[str, bytes]:
    """The members of a sample, by their extension; where it came from is in the json, as `drawn_from`."""
    image, caption, metadata = samples.members(position)
    with Image.open(io.BytesIO(image)) as opened:
        # an MPO or a GIF went by one of these names in its shard, and would by its own be no picture of a shard
        extension = {"PNG": "png", "WEBP": "webp"}.get(opened.format or "", "jpg")
    said = json.dumps(parse_json(metadata) | {"drawn_from": as_text(samples.key(position))})
    return {extension: image, "txt": caption, "json": said.encode()}
