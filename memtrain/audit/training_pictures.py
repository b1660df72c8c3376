"""The pictures that a model was trained on, of which the nearest to a generation is searched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator

import numpy as np
from torch import Tensor

from memtrain.audit.training_samples import draw_positions
from memtrain.core.streams import Stream, place_seed
from memtrain.data.images import BadSample
from memtrain.data.samples import ShardSamples

log = logging.getLogger(__name__)

_AT_ONCE = 256  # pictures


class TrainingPictures:
    """Pictures of the shards, read some at a time; what cannot be read is named and left out.

    Args:
        held_out: positions that are known not to have been trained on.
        limit: so many at most, drawn by seed; None: all.
        always: positions that are among them, drawn or not.
    """

    def __init__(
        self, samples: ShardSamples, held_out: Collection[int], limit: int | None, always: Collection[int], seed: int
    ):
        if limit is not None and limit < 1:
            raise ValueError(f"nearest must be >= 1, got {limit}; null searches all pictures of the shards")
        self.samples = samples
        drawn = draw_positions(samples, limit or len(samples), place_seed(seed, Stream.SEARCHED, 0, 0))
        self.positions = sorted({*drawn, *always} - {*held_out})

    def __len__(self) -> int:
        return len(self.positions)

    def some_at_a_time(self) -> list[list[int]]:
        """The positions, in parts that fit into memory with their pixels."""
        return [self.positions[first : first + _AT_ONCE] for first in range(0, len(self.positions), _AT_ONCE)]

    def blocks(
        self, size: tuple[int, int], features: Callable[[np.ndarray], Tensor], read: list[int]
    ) -> Iterator[Tensor]:
        """What `features` makes of the pictures, (P, height, width, 3) uint8 -> (P, …), block by block.

        Args:
            size: height and width at which they are seen.
            read: the positions of what was yielded so far are added to it.
        """
        for some in self.some_at_a_time():
            pixels, found = [], []
            for position in some:
                try:
                    pixels.append(self.samples.get(position, size=size)[0].transpose(1, 2, 0))
                    found.append(position)
                except BadSample as problem:
                    log.warning("left out %s: %s", self.samples.key(position), problem)
            if found:
                read.extend(found)
                yield features(np.stack(pixels))
