"""The demo's pictures as samples, composed when asked for: what the tiny Stable Diffusion was pretrained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memtrain.data.datamodule import DataModule
from memtrain.data.view import Seen, Sizes, View
from memtrain.demo.compose import RESOLUTION, Composites

_SHARD = 10_000  # samples


class CompositeSamples:
    """The first `count` composites of a seed. See `memtrain.data.batches.Samples`."""

    sizes = [(RESOLUTION, RESOLUTION)]  # noqa: RUF012

    def __init__(self, seed: int, count: int):
        self.composites, self.count = Composites(seed), count

    @property
    def counts(self) -> list[int]:
        """Samples of each shard: as if they lay in shards of a size that can be permuted at once."""
        whole, rest = divmod(self.count, _SHARD)
        return [_SHARD] * whole + [rest] * (rest > 0)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Nothing is to be fetched."""

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Nothing is to be read."""

    def key(self, index: int) -> str:
        return f"composites/{index:09d}"

    def size_of(self, index: int) -> tuple[int, int]:
        return self.sizes[0]

    def get(self, index: int, view: View, size: tuple[int, int]) -> Seen:
        """Image (3, 64, 64) uint8 and caption, seen straight whatever the view."""
        composite = self.composites[index]
        pixels = composite.image.transpose(2, 0, 1)  # (64, 64, 3) -> (3, 64, 64)
        whole = Sizes(RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION)
        return Seen(np.ascontiguousarray(pixels), composite.caption, whole)


def from_composites(
    count: int,
    resolution: int,
    batch_size: int,
    num_workers: int,
    seed: int,
    canaries_file: str | None = None,
    sacrificed_keys: Sequence[str] = (),
    **groups: Any,
) -> DataModule:
    """Build the DataModule of `data=composites`. `groups`: its canaries, repeats, sacrificed and reference."""
    if canaries_file:
        raise ValueError(f"canaries.file={canaries_file} lists samples of data=shards; leave it out here")
    if sacrificed_keys:
        raise ValueError("canaries.sacrificed_keys names samples of data=shards; use canaries.sacrificed here")
    if resolution != RESOLUTION:
        raise ValueError(f"data.resolution of composites is {RESOLUTION}, got {resolution}")
    return DataModule(CompositeSamples(seed, count), batch_size, num_workers, seed, **groups)
