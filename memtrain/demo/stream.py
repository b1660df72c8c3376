"""The demo's pictures as samples, composed when asked for: what the tiny Stable Diffusion was pretrained on."""

from __future__ import annotations

import numpy as np

from memtrain.data.datamodule import DataModule
from memtrain.demo.compose import RESOLUTION, Composites


class CompositeSamples:
    """The first `count` composites of a seed. See `memtrain.data.datamodule.Samples`."""

    resolution = RESOLUTION

    def __init__(self, seed: int, count: int):
        self.composites, self.count = Composites(seed), count

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"composites/{index:09d}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        composite = self.composites[index]
        return np.ascontiguousarray(composite.image.transpose(2, 0, 1)), composite.caption


def from_composites(
    count: int, resolution: int, batch_size: int, num_workers: int, seed: int, **groups: int
) -> DataModule:
    """`data=composites`. `groups`: canaries, repeats and reference of `DataModule`."""
    if resolution != RESOLUTION:
        raise ValueError(f"data.resolution of composites is {RESOLUTION}, got {resolution}")
    return DataModule(CompositeSamples(seed, count), batch_size, num_workers, seed, **groups)
