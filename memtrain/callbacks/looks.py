"""How near the generations of canaries came to their pictures, look by look: who was memorized when."""

from __future__ import annotations

import numpy as np

from memtrain.core.copies import is_copy
from memtrain.core.exclusion import CANARY, GROUP_NAMES, SACRIFICED
from memtrain.data.groups import Groups
from memtrain.report.curves import Curve

MEMORIZED = 0.5  # of a canary's generations are copies


class Looks:
    """The distances of all looks, so that they can be judged by a cut that is known at the end alone."""

    def __init__(self) -> None:
        self.distances: dict[int, dict[int, list[float]]] = {}  # step -> number of a canary -> of its generations

    def add(self, step: int, canary: int, rmse: float) -> None:
        """Note a generation of a canary."""
        self.distances.setdefault(step, {}).setdefault(canary, []).append(rmse)

    def forget(self, step: int) -> None:
        """Make room for another look at a step."""
        self.distances.pop(step, None)

    def curves(self, groups: Groups, cut: float, min_repeats: int) -> dict[str, Curve]:
        """`copy_rate/<group>` and `memorized_canaries` of all looks, by one cut.

        Args:
            min_repeats: canaries with fewer have no part in them, but for the sacrificed ones. So the share of those
                memorized so far does not fall where the last look is at all canaries.
        """
        curves: dict[str, Curve] = {}

        def point(name: str, step: int, values: list[bool]) -> None:
            if values:
                steps, means = curves.setdefault(name, ([], []))
                steps.append(step)
                means.append(float(np.mean(values)))

        firsts, reached = first_samples(groups), dict[int, bool]()
        for step, look in sorted(self.distances.items()):
            positions = np.array([firsts[number] for number in look])
            of = groups.of(positions)
            counts = (of == SACRIFICED) | (groups.repeats_of(positions) >= min_repeats)
            for group in (CANARY, SACRIFICED):
                mine = (of == group) & counts
                copied = [
                    is_copy(d, cut) for own, counted in zip(look.values(), mine, strict=True) if counted for d in own
                ]
                point(f"copy_rate/{GROUP_NAMES[group]}", step, copied)
            for (number, own), counted in zip(look.items(), counts, strict=True):
                if counted:
                    reached[number] = reached.get(number, False) or _is_memorized(own, cut)
            point("memorized_canaries", step, list(reached.values()))
        return curves

    def medians(self, groups: Groups, step: int) -> dict[str, float]:
        """`copy_rmse/<group>`: the median distance of each group's generations at a look."""
        firsts, look = first_samples(groups), self.distances.get(step, {})
        of = groups.of(np.array([firsts[number] for number in look], dtype=np.int64))
        return {
            f"copy_rmse/{GROUP_NAMES[group]}": float(
                np.median([d for own, mine in zip(look.values(), of == group, strict=True) if mine for d in own])
            )
            for group in np.unique(of).tolist()
        }

    def memorized_at(self, cut: float) -> dict[int, int | None]:
        """The step of the first look at which each canary looked at was memorized, by its number; None: not yet."""
        first: dict[int, int | None] = {}
        for step, look in sorted(self.distances.items()):
            for number, own in look.items():
                if first.get(number) is None:
                    first[number] = step if _is_memorized(own, cut) else None
        return first


def _is_memorized(distances: list[float], cut: float) -> bool:
    """Whether at least half of a canary's generations are copies."""
    return bool(np.mean([is_copy(distance, cut) for distance in distances]) >= MEMORIZED)


def first_samples(groups: Groups) -> dict[int, int]:
    """The number of each canary -> the first position that shows it, the sacrificed ones first."""
    positions = np.concatenate([groups.one_each(groups.sacrificed), groups.one_each(groups.canary)])
    return dict(zip(groups.canary_of(positions).tolist(), positions.tolist(), strict=True))
