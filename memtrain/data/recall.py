"""How many near duplicates are found, and how many of those found are none: on a corpus into which some are planted."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from webdataset import TarWriter

from memtrain.data.bench import jpeg, photo
from memtrain.data.check import read_extent
from memtrain.data.distribute import Distributor, Part
from memtrain.data.duplicate_groups import group_duplicates
from memtrain.data.duplicates import hash_shards
from memtrain.data.partials import open_manifest
from memtrain.data.shards import index_shard
from memtrain.data.sources import LocalShard, local_shards
from memtrain.data.staged import on_disk

_SIDE = 256  # px, of made-up pictures
_SHARD = 1000  # samples of a shard
EVERY = 10  # one copy for so many pictures


def _cropped(image: Image.Image, share: float) -> Image.Image:
    """Without this share of its width and height, taken from the left and the top alone."""
    return image.crop((round(image.width * share), round(image.height * share), image.width, image.height))


KINDS: dict[str, Callable[[Image.Image], tuple[Image.Image, int]]] = {  # a picture -> the copy, and its JPEG quality
    "JPEG at quality 30": lambda image: (image, 30),
    "half the size": lambda image: (image.resize((max(1, image.width // 2), max(1, image.height // 2))), 95),
    "mirrored": lambda image: (ImageOps.mirror(image), 95),
    "mirrored, quality 30": lambda image: (ImageOps.mirror(image), 30),
    "2 % cropped": lambda image: (_cropped(image, 0.02), 95),
    "5 % cropped": lambda image: (_cropped(image, 0.05), 95),
    "10 % cropped": lambda image: (_cropped(image, 0.1), 95),
}


@dataclass(frozen=True)
class Recall:
    """`planted` and `found` copies of each kind; `pairs` in the groups, of which `true` are of one picture."""

    pictures: int
    distance: int
    planted: dict[str, int]
    found: dict[str, int]
    pairs: int
    true: int

    @property
    def precision(self) -> float:
        return self.true / self.pairs if self.pairs else 1.0

    def recall(self, kind: str) -> float:
        return self.found[kind] / max(1, self.planted[kind])


def plant(folder: Path, pictures: int, source: list[LocalShard]) -> int:
    """Write shards of so many pictures, and after each tenth a copy of it, of each kind in turn; returns how many.

    Args:
        source: shards to take the pictures from, the first ones that can be decoded; without any they are made up.
    """
    kinds, written = list(KINDS), 0
    tar: TarWriter | None = None
    try:
        for number, data in enumerate(_pictures(pictures, source)):
            if number % _SHARD == 0:
                if tar is not None:
                    tar.close()
                tar = TarWriter(str(folder / f"{number // _SHARD:05d}.tar"), mtime=0)
            assert tar is not None
            tar.write({"__key__": f"{number:09d}", "jpg": data, "txt": f"picture {number}"})
            written += 1
            if number % EVERY == 0:
                kind = kinds[number // EVERY % len(kinds)]
                image, quality = KINDS[kind](Image.open(io.BytesIO(data)).convert("RGB"))
                copy = jpeg(np.asarray(image), quality=quality)
                tar.write({"__key__": f"{number:09d}-{kinds.index(kind)}", "jpg": copy, "txt": f"copy, {kind}"})
    finally:
        if tar is not None:
            tar.close()
    return written


def _pictures(count: int, source: list[LocalShard]) -> Iterator[bytes]:
    if not source:
        yield from (jpeg(photo(seed, _SIDE, _SIDE)) for seed in range(count))
        return
    for shard in source:
        with on_disk(shard) as local, local.path.open("rb") as file:
            for entry in index_shard(local.path).entries:
                if count == 0:
                    return
                data = read_extent(file, entry.image)
                try:
                    Image.open(io.BytesIO(data)).convert("RGB")
                except (OSError, ValueError, Image.DecompressionBombError):
                    continue
                yield data
                count -= 1


def measure_recall(
    folder: Path, pictures: int, source: list[LocalShard], distance: int, distributor: Distributor, memory: int
) -> Recall:
    """Plant copies among pictures, look for duplicates as `shards duplicates` does, and compare.

    Args:
        folder: an empty folder, for the shards, `groups.parquet` and partial results.
        memory: bytes that the joins, and the search, may take.
    """
    if pictures < EVERY:
        raise ValueError(f"--pictures must be >= {EVERY}, got {pictures}")
    written = plant(folder, pictures, source)
    manifest = open_manifest(folder / "groups.partials", "duplicates", "", local_shards([str(folder)]))
    for done in hash_shards(manifest, Part(), distributor):
        if done.failure:
            raise OSError(done.failure)
    found = group_duplicates(
        manifest, folder / "groups.parquet", distance, memory, 1, distributor, memory, lambda items, _: items
    )
    groups: dict[int, list[str]] = {}
    table = pq.read_table(found.file, columns=["group", "key"])
    for group, key in zip(table["group"].to_pylist(), table["key"].to_pylist(), strict=True):
        groups.setdefault(group, []).append(key.rsplit("/", 1)[1])
    together = [pair for keys in groups.values() for pair in combinations(sorted(keys), 2)]
    true = [copy for original, copy in together if copy.startswith(f"{original}-")]
    names = list(KINDS)
    hit = Counter(names[int(copy.rsplit("-", 1)[1])] for copy in true)
    planted = Counter(names[number // EVERY % len(names)] for number in range(0, written, EVERY))
    return Recall(
        written,
        distance,
        {kind: planted[kind] for kind in names},
        {kind: hit[kind] for kind in names},
        len(together),
        len(true),
    )
