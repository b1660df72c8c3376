"""How the copy rate of canaries grows with their repeats, and from how many on half of their generations are copies.

Shapes: N generations, K doses (numbers of repeats that canaries have).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.core.statistics import interval_over_groups

HALF = 0.5


@dataclass(frozen=True)
class DoseCurve:
    """The copy rate at each dose, from the smallest, with intervals over canaries; nan where there is one canary."""

    repeats: list[int]  # (K,)
    rates: list[float]  # (K,)
    low: list[float]
    high: list[float]
    canaries: list[int]  # how many have each dose
    half: float  # the dose at which half of the generations are copies; inf: above all, -inf: below all
    half_low: float
    half_high: float

    def said(self, dose: float) -> float | str:
        """`half` or one of its bounds, in words where no canary had it."""
        if math.isinf(dose):
            return f"above {self.repeats[-1]}" if dose > 0 else f"below {self.repeats[0]}"
        return dose


def dose_curve(
    repeats: Tensor, canary: Tensor, copied: Tensor, samples: int = 500, level: float = 0.95, seed: int = 0
) -> DoseCurve:
    """The curve of these generations, with bootstrap intervals for which canaries are drawn anew.

    Args:
        repeats, canary, copied: (N,) of each generation its canary's dose (> 0), which canary that is, and whether it
            is a copy.

    Raises:
        ValueError: there is no generation.
    """
    if len(repeats) == 0:
        raise ValueError("a dose curve needs generations of at least one canary, and there are none")
    canaries, of = canary.unique(return_inverse=True)
    count = len(canaries)
    sizes = torch.bincount(of, minlength=count).double()  # here, and below: by canary
    copies = torch.zeros(count, dtype=torch.float64).index_add_(0, of, copied.double())
    dose = torch.zeros(count, dtype=repeats.dtype).index_copy_(0, of, repeats)
    drawn = torch.randint(count, (samples, count), generator=torch.Generator().manual_seed(seed))
    halves = torch.tensor([half_dose(dose[row], copies[row], sizes[row]) for row in drawn]).sort().values
    tail = (1 - level) / 2
    # of a sorted list, without interpolation: between a number and infinity lies nothing
    low, high = (halves[round(share * (samples - 1))].item() for share in (tail, 1 - tail))
    doses = dose.unique().tolist()
    at = [repeats == one for one in doses]
    bounds = [interval_over_groups(copied[mine], canary[mine], level=level, seed=seed) for mine in at]
    return DoseCurve(
        repeats=doses,
        rates=[copied[mine].double().mean().item() for mine in at],
        low=[bound[0] for bound in bounds],
        high=[bound[1] for bound in bounds],
        canaries=[int((dose == one).sum()) for one in doses],
        half=half_dose(dose, copies, sizes),
        half_low=low,
        half_high=high,
    )


def half_dose(repeats: Tensor, copies: Tensor, sizes: Tensor) -> float:
    """The dose at which the rate of copies reaches a half: of the isotonic regression, linear in the log between doses.

    The regression assumes that more repeats are copied no less, and no shape: where all canaries up to a dose are
    never copied and all above it always, which is usual, a logistic curve has no finite fit.

    Args:
        repeats, copies, sizes: (N,) of each canary its dose, its copies among its generations, and how many these are.

    Returns:
        -inf where it is below the smallest dose, inf where it is above the largest.
    """
    doses, place = repeats.unique(return_inverse=True)
    none = torch.zeros(len(doses), dtype=torch.float64)
    rates = isotonic(none.index_add(0, place, copies.double()), none.index_add(0, place, sizes.double()))
    reached = rates >= HALF
    if not reached.any():
        return math.inf
    first = int(reached.int().argmax())
    if first == 0:
        return -math.inf if rates[0] > HALF else float(doses[0])
    x, y = doses[first - 1 : first + 1].double().log().tolist(), rates[first - 1 : first + 1].tolist()
    return math.exp(x[0] + (x[1] - x[0]) * (HALF - y[0]) / (y[1] - y[0]))


def isotonic(sums: Tensor, weights: Tensor) -> Tensor:
    """The values nearest to sums / weights, by weighted squares, that never fall (Barlow and Brunk 1972).

    Value i is the largest over j ≤ i of the least over k ≥ i of the mean of j … k. (K,), (K,) -> (K,)
    """

    def means(parts: Tensor) -> Tensor:
        """Sums of the parts j … k. (K, K)"""
        ends = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
        return ends[None, 1:] - ends[:-1, None]

    mean = (means(sums) / means(weights)).triu()  # (K, K), [j, k]; below the diagonal nothing is looked at
    least_from = mean.flip(1).cummin(dim=1).values.flip(1)  # [j, i]: over k >= i, of which all are >= j where i >= j
    return least_from.masked_fill(~torch.ones_like(mean).triu().bool(), -torch.inf).max(dim=0).values
