"""Who is a canary, who is held out, and in which order the rest is seen.

The sequence of global batches is a function of (seed, corpus, global batch size); a rank takes its slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from memtrain.core.diffusion import place_seed
from memtrain.core.exclusion import CANARY, REFERENCE

_GROUPS, _EPOCH = 16, 17  # streams of randomness of this module, apart from those of core.diffusion


def _generator(seed: int, stream: int, number: int = 0) -> np.random.Generator:
    return np.random.default_rng(place_seed(seed, stream, number, 0))


@dataclass(frozen=True)
class Groups:
    """A partition of the corpus, drawn by seed. Arrays of positions in the corpus."""

    train: np.ndarray
    canary: np.ndarray
    reference: np.ndarray

    def of_samples(self) -> np.ndarray:
        """Group of each sample, core.exclusion's TRAINED, CANARY or REFERENCE. (N,) int64"""
        groups = np.zeros(len(self.train) + len(self.canary) + len(self.reference), dtype=np.int64)
        groups[self.canary] = CANARY
        groups[self.reference] = REFERENCE
        return groups


def draw_groups(num_samples: int, seed: int, canaries: int, reference: int) -> Groups:
    """Draw canaries and reference set; the canaries do not depend on the size of the reference set."""
    if canaries + reference >= num_samples:
        raise ValueError(
            f"canaries.count={canaries} and reference.count={reference} leave nothing of the {num_samples} "
            "samples to train on; lower them or add shards"
        )
    permuted = _generator(seed, _GROUPS).permutation(num_samples)
    canary, held_out = permuted[:canaries], permuted[num_samples - reference :]
    return Groups(train=np.sort(permuted[canaries : num_samples - reference]), canary=canary, reference=held_out)


@dataclass(frozen=True)
class EpochOrder:
    """Each trained sample once an epoch, each canary `repeats` times, permuted anew by (seed, epoch)."""

    groups: Groups
    repeats: int
    seed: int

    def __len__(self) -> int:
        return len(self.groups.train) + len(self.groups.canary) * self.repeats

    def epoch(self, number: int) -> np.ndarray:
        drawn = np.concatenate([self.groups.train, np.repeat(self.groups.canary, self.repeats)])
        return _generator(self.seed, _EPOCH, number).permutation(drawn)


class GlobalBatchSampler:
    """Micro-batches of one rank: lists of (place in the global batch, position in the corpus).

    The global batch of an optimizer step is `accumulate` x `world_size` x `batch_size` rows; an epoch's
    remainder that fills no global batch is left out. `__len__` counts the whole run, so that a loader that
    starts at `first_step` ends where the uninterrupted one ends.
    """

    def __init__(
        self, order, batch_size: int, accumulate: int, rank: int, world_size: int, num_steps: int, first_step: int = 0
    ):
        self.order, self.batch_size, self.accumulate = order, batch_size, accumulate
        self.rank, self.world_size = rank, world_size
        self.num_steps, self.first_step = num_steps, first_step
        self.global_batch_size = batch_size * accumulate * world_size
        if len(order) < self.global_batch_size:
            raise ValueError(
                f"an epoch has {len(order)} samples, fewer than one global batch of {self.global_batch_size} "
                f"(data.batch_size={batch_size} x trainer.accumulate_grad_batches={accumulate} x {world_size} "
                "ranks); lower data.batch_size or add shards"
            )

    def __len__(self) -> int:
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = len(self.order) // self.global_batch_size
        epoch, rows = -1, None
        for step in range(self.first_step, self.num_steps):
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                rows = self.order.epoch(epoch)
            start = step % steps_per_epoch * self.global_batch_size
            for micro in range(self.accumulate):
                first = (micro * self.world_size + self.rank) * self.batch_size
                yield [(place, int(rows[start + place])) for place in range(first, first + self.batch_size)]
