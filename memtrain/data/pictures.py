"""Which samples of a corpus show the same picture: what training learns of one, it learns of all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


def among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which values are among the known ones, which are sorted. (n,), (k,) -> (n,) bool"""
    if len(known) == 0:
        return np.zeros(len(values), dtype=bool)
    return known[np.searchsorted(known, values).clip(max=len(known) - 1)] == values


@dataclass(frozen=True)
class Pictures:
    """Groups of duplicates among the samples of a corpus. Samples without a duplicate are not listed.

    Args:
        positions: (M,) int64, sorted: the samples that have a duplicate.
        first: (M,) int64, for each the first position of its group.
        sizes: the first position of each group, sorted, and how many members it has, (G,) int64 each; None: as counted.
    """

    positions: np.ndarray
    first: np.ndarray
    sizes: tuple[np.ndarray, np.ndarray] | None = None

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
        firsts, sizes = self.sizes_of_groups
        if len(firsts) == 0:
            return np.ones(len(positions), dtype=np.int64)
        first = self.of(positions)
        place = np.searchsorted(firsts, first).clip(max=len(firsts) - 1)
        return np.where(firsts[place] == first, sizes[place], 1)

    @cached_property
    def sizes_of_groups(self) -> tuple[np.ndarray, np.ndarray]:
        """The first position of each group, sorted, and how many its members are."""
        return np.unique(self.first, return_counts=True) if self.sizes is None else self.sizes

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(self.sizes_of_groups[0])

    def groups(self, most: int, ahead: np.ndarray | None = None) -> list[np.ndarray]:
        """The positions of the `most` largest groups, or of fewer; of equally large ones, of those that come first.

        Args:
            ahead: first positions of groups that come before the others.
        """
        firsts, sizes = self.sizes_of_groups
        later = np.ones(len(firsts), dtype=bool) if ahead is None else ~np.isin(firsts, ahead)
        # the order is wanted of a few, of maybe 40 million: those that cannot be among them are left out first
        least = np.partition(sizes, -most)[-most] if 0 < most < len(sizes) else 0
        [able] = np.nonzero((sizes >= least) | ~later)
        chosen = firsts[able[np.lexsort((firsts[able], -sizes[able], later[able]))]][:most]
        among = np.isin(self.first, chosen)
        positions, first = self.positions[among], self.first[among]
        return [positions[first == one] for one in chosen]


NO_DUPLICATES = Pictures(np.zeros(0, np.int64), np.zeros(0, np.int64))
