"""What a run's last generations came to: copy rates with intervals, and dose curves, drawn as `doses.png`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from memtrain.core.copies import is_copy
from memtrain.core.dose import HALF, DoseCurve, dose_curve
from memtrain.core.exclusion import CANARY, GROUP_NAMES, REFERENCE, SACRIFICED
from memtrain.core.statistics import interval_over_groups
from memtrain.data.copies_file import CopyRow

GROUPS = tuple(GROUP_NAMES[number] for number in (CANARY, REFERENCE, SACRIFICED))
ALL_KINDS = "all"
_COLOURS = ("#c0392b", "#2c7fb8", "#2e8b57", "#8e5ea2", "#d68910", "#17a2a2", "#6b7280")
_ALL_COLOUR, _MUTED = "#1f2430", "#6b7280"


@dataclass(frozen=True)
class CopyRate:
    """A share of generations, with a 95 % bootstrap interval for which canaries are drawn anew."""

    rate: float
    low: float | None  # None: of one canary no spread is known
    high: float | None
    canaries: int  # of the reference set: captions
    generations: int

    def said(self) -> str:
        """`12.5 % (5.0 to 20.0)`"""
        if self.low is None or self.high is None:
            return f"{self.rate:.1%}"
        return f"{self.rate:.1%} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def counted(rows: Sequence[CopyRow], min_repeats: int = 1) -> list[CopyRow]:
    """The generations that copy rates count: not those of canaries with fewer repeats."""
    return [row for row in rows if row.group != GROUP_NAMES[CANARY] or row.repeats >= min_repeats]


def rate_of(rows: Sequence[CopyRow], cut: float | None = None) -> CopyRate | None:
    """The share of copies of their own picture; with a cut, of any training picture. None: there is no generation."""
    if not rows:
        return None
    copied = torch.tensor([row.is_copy if cut is None else is_copy(row.nearest_rmse, cut) for row in rows])
    names = {key: number for number, key in enumerate(dict.fromkeys(map(_whose, rows)))}
    low, high = interval_over_groups(copied, torch.tensor([names[_whose(row)] for row in rows]))
    bounds = (None, None) if math.isnan(low) else (low, high)
    return CopyRate(copied.double().mean().item(), *bounds, len(names), len(rows))


def _whose(row: CopyRow) -> int | str:
    """What a generation's interval draws anew: its canary; of the reference set, its caption."""
    return row.key if row.canary is None else row.canary


def rates_by_group(rows: Sequence[CopyRow], cut: float | None = None) -> dict[str, CopyRate]:
    """`rate_of` the generations of each group that has any."""
    found = {group: rate_of([row for row in rows if row.group == group], cut) for group in GROUPS}
    return {group: rate for group, rate in found.items() if rate is not None}


def rates_by_kind(rows: Sequence[CopyRow]) -> dict[str, CopyRate]:
    """`rate_of` the generations of each kind of canary; the sacrificed ones are not counted."""
    found: dict[str, CopyRate] = {}
    for kind in dict.fromkeys(row.kind for row in rows if row.group == GROUP_NAMES[CANARY]):
        rate = rate_of([row for row in rows if row.group == GROUP_NAMES[CANARY] and row.kind == kind])
        if rate is not None:
            found[kind] = rate
    return found


def nearest_quantile(rows: Sequence[CopyRow], share: float = 0.05) -> float | None:
    """The quantile of the distances to the nearest training picture, 5 % of which are nearer; None: there is none."""
    distances = torch.tensor([row.nearest_rmse for row in rows], dtype=torch.float64)
    distances = distances[distances.isfinite()]
    return distances.quantile(share).item() if len(distances) else None


def doses_by_kind(rows: Sequence[CopyRow]) -> dict[str, DoseCurve]:
    """The dose curve of all canaries together, and of each kind where there are several."""
    of = [row for row in rows if row.group == GROUP_NAMES[CANARY]]
    if not of:
        return {}
    kinds = list(dict.fromkeys(row.kind for row in of))
    chosen = {ALL_KINDS: of} | ({kind: [row for row in of if row.kind == kind] for kind in kinds} if kinds[1:] else {})
    return {
        name: dose_curve(
            torch.tensor([row.repeats for row in some]),
            torch.tensor([row.canary for row in some]),
            torch.tensor([row.is_copy for row in some]),
        )
        for name, some in chosen.items()
    }


def as_json(curve: DoseCurve) -> dict[str, Any]:
    """A dose curve without NaN and infinity, which JSON has not: null, and in words."""
    lists = {name: [_or_none(value) for value in asdict(curve)[name]] for name in ("repeats", "rates", "low", "high")}
    half = {name: curve.said(getattr(curve, name)) for name in ("half", "half_low", "half_high")}
    return {**lists, "canaries": curve.canaries, **half}


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def half_in_words(curve: DoseCurve) -> str:
    """`half copied at 37 repeats (20 to above 400)`"""

    def show(dose: float) -> str:
        said = curve.said(dose)
        return said if isinstance(said, str) else f"{said:.3g}"

    where = show(curve.half)
    where = f"{where} repeats" if math.isinf(curve.half) else f"at {where} repeats"
    bounds = [show(curve.half_low), show(curve.half_high)]
    return f"half copied {where}" + (f" ({' to '.join(bounds)})" if bounds[0] != bounds[1] else "")


def draw_doses(path: Path | BinaryIO, curves: Mapping[str, DoseCurve], chance: float | None = None) -> None:
    """Draw copy rate against repeats, a line each, such as kinds of one run, or one kind of several runs.

    Bars are 95 % intervals over canaries; the legend has the dose at which half of the generations are copies.

    Args:
        chance: the rate from captions that were never trained on.

    Raises:
        ValueError: there is no curve.
    """
    if not curves:
        raise ValueError("there is no dose curve to draw: no run has canaries")
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axis = figure.subplots()
    doses = sorted({dose for curve in curves.values() for dose in curve.repeats})
    for number, (name, curve) in enumerate(curves.items()):
        # curves beside one another, so that their bars do not hide one another
        shift = 1.03 ** (number - (len(curves) - 1) / 2)
        colour = _ALL_COLOUR if name == ALL_KINDS else _COLOURS[number % len(_COLOURS)]
        _draw_curve(axis, name, curve, colour, shift)
    axis.axhline(HALF, color=_MUTED, linewidth=0.8, linestyle=":")
    if chance is not None:
        axis.axhline(chance, color=_MUTED, linewidth=1, linestyle="--", label=f"never trained on: {chance:.1%}")
    axis.set_xscale("log")
    axis.set_xticks(doses if len(doses) <= 12 else [doses[0], doses[-1]])
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.minorticks_off()
    axis.set_xlim(doses[0] / 1.3, doses[-1] * 1.3)
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axis.set_xlabel("repeats of a canary in an epoch")
    axis.set_ylabel("generations that copy its picture")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(path, format="png")


def _draw_curve(axis: Axes, name: str, curve: DoseCurve, colour: str, shift: float) -> None:
    x, rates = [dose * shift for dose in curve.repeats], curve.rates
    label = f"{name}: {half_in_words(curve)}, {sum(curve.canaries)} canaries".replace("$", r"\$")
    axis.plot(x, rates, color=colour, marker="o", markersize=5, linewidth=1.6, label=label)
    known = [place for place, low in enumerate(curve.low) if math.isfinite(low)]
    if known:
        # a percentile interval of a few canaries may leave out the rate itself by a rounding
        below = [max(0.0, rates[place] - curve.low[place]) for place in known]
        above = [max(0.0, curve.high[place] - rates[place]) for place in known]
        axis.errorbar(
            [x[place] for place in known], [rates[place] for place in known], yerr=[below, above], fmt="none",
            ecolor=colour, elinewidth=1, capsize=3, alpha=0.7,
        )  # fmt: skip
