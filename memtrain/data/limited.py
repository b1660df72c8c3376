"""Groups of duplicates of which an epoch sees only some members, others each epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memtrain.data.groups import Groups
from memtrain.data.pictures import Pictures, among

# makes arrays by their names, or finds them made before of the same inputs
Keep = Callable[..., dict[str, np.ndarray]]


def as_made(make: Callable[[], dict[str, np.ndarray]], *inputs: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays that `make` makes, each time anew."""
    return make()


@dataclass(frozen=True)
class LimitedGroups:
    """The groups of duplicates that an epoch would see more often than is allowed, and whom it sees of each.

    A visit is a member, as many times as its shard counts. The visits of a group stand in a row, mixed; an epoch takes
    so many as are allowed, and the next epoch those that follow, round and round. Only duplicates cost memory.

    Args:
        visits: (V,) int64, the samples, group by group.
        starts, sizes, taken: of each group where its row begins, how long it is, and how many of it an epoch takes.
        positions: all members that are not planted, each once, sorted. int64
    """

    visits: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    taken: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        """How many visits an epoch takes; it is the same for each."""
        return int(self.taken.sum())

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Whom an epoch sees, sorted; a sample twice where its shard counts twice. (len(self),) int64"""
        taken = np.asarray(self.taken)
        group = np.arange(len(taken)).repeat(taken)
        turn = np.arange(len(group)) - (taken.cumsum() - taken)[group]  # 0, 1, … of each group
        place = (epoch * taken[group] + turn) % self.sizes[group]
        return np.sort(self.visits[self.starts[group] + place])


def limited_groups(
    groups: Groups, doses: np.ndarray, times: np.ndarray, max_visits: int | None, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """What `LimitedGroups` is made of.

    Args:
        groups: who is planted, who is sacrificed and so has no limit, and which samples show the same picture.
        doses: how often an epoch sees each of `groups.planted`, at most `max_visits` times; these visits count first.
        times: (M,) int64, how often an epoch would see each of `groups.pictures.positions`.
        max_visits: of a group in an epoch; None: any number, so that no group is limited.
        generator: mixes the members of a group.
    """
    empty = np.zeros(0, np.int64)
    if max_visits is None or len(groups.pictures.positions) == 0:
        return dict.fromkeys(("visits", "starts", "sizes", "taken", "positions"), empty)
    ordinary = ~among(groups.pictures.positions, np.sort(np.concatenate([groups.planted, groups.sacrificed])))
    visits, picture = _mixed(groups.pictures, np.where(ordinary, times, 0), generator)
    pictures, group, sizes = np.unique(picture, return_inverse=True, return_counts=True)
    planted = np.zeros(len(pictures), dtype=np.int64)  # of each picture, how often its planted canaries are seen
    repeated = np.isin(groups.planted, groups.pictures.positions)  # those that have duplicates, a few
    firsts = groups.pictures.of(groups.planted[repeated])
    there = np.isin(firsts, pictures)
    np.add.at(planted, np.searchsorted(pictures, firsts[there]), doses[repeated][there])
    taken = (max_visits - planted).clip(min=0)
    limited = taken < sizes
    visits, sizes, taken = visits[limited[group]], sizes[limited], taken[limited]
    starts = sizes.cumsum() - sizes
    return dict(visits=visits, starts=starts, sizes=sizes, taken=taken, positions=np.unique(visits))


def _mixed(pictures: Pictures, times: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Visits, group by group and mixed within each: of each the sample and its picture, (V,) int64 each."""
    visits = generator.permutation(np.arange(len(times)).repeat(times))
    visits = visits[np.argsort(pictures.first[visits], kind="stable")]
    return pictures.positions[visits], pictures.first[visits]
