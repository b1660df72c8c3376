"""Groups of duplicates of which an epoch sees only some members, others each epoch."""

from __future__ import annotations

import numpy as np

from memtrain.data.groups import Groups
from memtrain.data.pictures import Pictures


class LimitedGroups:
    """The groups of duplicates that an epoch would see more often than `max_visits` times, and whom it sees of each.

    A visit is a member, as many times as its shard counts. The visits of a group stand in a row, mixed; an epoch takes
    so many as are allowed, and the next epoch those that follow, round and round. Only duplicates cost memory.

    Args:
        groups: who is planted, and which samples show the same picture.
        doses: how often an epoch sees each of `groups.planted`, at most `max_visits` times; these visits count first.
        times: (M,) int64, how often an epoch would see each of `groups.pictures.positions`.
        max_visits: of a group in an epoch; None: any number, so that no group is limited.
        generator: mixes the members of a group.
    """

    def __init__(
        self,
        groups: Groups,
        doses: np.ndarray,
        times: np.ndarray,
        max_visits: int | None,
        generator: np.random.Generator,
    ):
        self.visits = self.places = self.sizes = self.taken = np.zeros(0, np.int64)
        if max_visits is None or len(groups.pictures.positions) == 0:
            return
        ordinary = ~np.isin(groups.pictures.positions, groups.planted)
        visits, picture = _mixed(groups.pictures, np.where(ordinary, times, 0), generator)
        _, group, sizes = np.unique(picture, return_inverse=True, return_counts=True)
        planted = np.zeros(len(visits), dtype=np.int64)  # of each visit, how often its picture's planted canary is seen
        repeated = np.isin(groups.planted, groups.pictures.positions)  # those that have duplicates, a few
        firsts = groups.pictures.of(groups.planted[repeated]).tolist()
        for first, dose in zip(firsts, doses[repeated].tolist(), strict=True):
            planted[picture == first] += dose
        taken = (max_visits - planted).clip(min=0)
        limited = taken < sizes[group]
        starts = sizes.cumsum() - sizes
        # here: of each visit of a limited group, its sample, its place in the row, the row's length, and how many of
        # the row an epoch takes, (V,) int64 each
        self.visits, self.places = visits[limited], (np.arange(len(visits)) - starts[group])[limited]
        self.sizes, self.taken = sizes[group][limited], taken[limited]

    @property
    def positions(self) -> np.ndarray:
        """All members of limited groups that are not planted, sorted. int64"""
        return np.unique(self.visits)

    def __len__(self) -> int:
        """How many visits an epoch takes; it is the same for each."""
        return int(self.taken[self.places == 0].sum())

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Whom an epoch sees, sorted; a sample twice where its shard counts twice. (len(self),) int64"""
        return np.sort(self.visits[(self.places - epoch * self.taken) % self.sizes.clip(min=1) < self.taken])


def _mixed(pictures: Pictures, times: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Visits, group by group and mixed within each: of each the sample and its picture, (V,) int64 each."""
    visits = generator.permutation(np.arange(len(times)).repeat(times))
    visits = visits[np.argsort(pictures.first[visits], kind="stable")]
    return pictures.positions[visits], pictures.first[visits]
