"""Which samples of a corpus show the same picture: what training learns of one, it learns of all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Pictures:
    """Groups of duplicates among the samples of a corpus. Samples without a duplicate are not listed.

    Args:
        positions: (M,) int64, sorted: the samples that have a duplicate.
        first: (M,) int64, for each the first position of its group.
    """

    positions: np.ndarray
    first: np.ndarray

    @classmethod
    def labelled(cls, positions: np.ndarray, labels: np.ndarray) -> Pictures:
        """Make the groups of positions (n,) that have the same label (n,); a group of one is no duplicate."""
        order = np.argsort(positions, kind="stable")
        positions, labels = positions[order], labels[order]
        _, first, group, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
        several = sizes[group] > 1
        return cls(positions[several].astype(np.int64), positions[first[group]][several].astype(np.int64))

    def of(self, positions: np.ndarray) -> np.ndarray:
        """The first position that shows the same picture; its own where there is no other. (n,) -> (n,) int64"""
        if len(self.positions) == 0:
            return np.asarray(positions, dtype=np.int64)
        place = np.searchsorted(self.positions, positions).clip(max=len(self.positions) - 1)
        return np.where(self.positions[place] == positions, self.first[place], positions)

    def copies(self, positions: np.ndarray) -> np.ndarray:
        """How many samples of the corpus show the same picture; 1 where there is no other. (n,) -> (n,) int64"""
        firsts, sizes = self._sizes
        if len(firsts) == 0:
            return np.ones(len(positions), dtype=np.int64)
        first = self.of(positions)
        place = np.searchsorted(firsts, first).clip(max=len(firsts) - 1)
        return np.where(firsts[place] == first, sizes[place], 1)

    @cached_property
    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """The first position of each group, sorted, and how many its members are."""
        return np.unique(self.first, return_counts=True)

    def groups(self) -> list[np.ndarray]:
        """The positions of each group, the largest first; of equally large ones, the one that comes first."""
        order = np.argsort(self.first, kind="stable")
        starts = np.flatnonzero(np.diff(self.first[order], prepend=-1))
        found = np.split(self.positions[order], starts[1:]) if len(order) else []
        return sorted(found, key=len, reverse=True)


NO_DUPLICATES = Pictures(np.zeros(0, np.int64), np.zeros(0, np.int64))
