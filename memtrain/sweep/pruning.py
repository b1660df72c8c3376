"""When a running trial is given up. Optuna's pruners look at one objective; this rule looks at both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple


class Objectives(NamedTuple):
    """What a trial comes to at a step; less is better of both."""

    memorization: float
    quality: float


Curve = dict[int, Objectives]  # step -> what was measured there


@dataclass(frozen=True)
class MedianRule:
    """Give up what is worse than the median of the other trials at the same step in both objectives.

    A trial that is better than half of the others in one of them may come to lie on the Pareto front, so it goes on.
    Equal is not worse: early on, when nothing is copied yet, nothing is given up.

    Args:
        min_trials: so many others must have reached the step.
        min_step: earlier steps do not count.
    """

    min_trials: int
    min_step: int

    def __post_init__(self):
        for name, least in (("min_trials", 1), ("min_step", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"study.prune.{name} must be >= {least}, got {getattr(self, name)}")

    def gives_up_at(self, curve: Curve, others: Sequence[Curve]) -> int | None:
        """The newest step, if the trial is to be given up there.

        The last step that others reached does not count: there is nothing left to save.
        """
        if not curve or not others:
            return None
        step = max(curve)
        there = [other[step] for other in others if step in other]
        if step < self.min_step or len(there) < self.min_trials:
            return None
        if step >= max(max(other) for other in others if other):
            return None
        memorization, quality = (median(values) for values in zip(*there, strict=True))
        worse = curve[step].memorization > memorization and curve[step].quality > quality
        return step if worse else None
