"""`plane.png`: memorization against quality, one point a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memtrain.report.pictures import INK, MUTED

_NAMED = 8  # more points than that are numbered: names would lie on one another
_NEAR = (0.03, 0.06)  # of the plane's width and height: numbers of points within it would lie on one another
_COLOURS = ("#c0392b", "#2c7fb8", "#2e8b57", "#8e5ea2", "#d68910", "#17a2a2", "#6b7280", "#1f2430")


@dataclass(frozen=True)
class Point:
    """A model in the plane; less is better of both figures."""

    model: str
    memorization: float
    quality: float


def draw_plane(path: Path, points: Sequence[Point], memorization: str, quality: str) -> None:
    """Draw a point a model. Less is better on both axes, so that the best corner is the lower left one.

    Many models are numbered, with their names beside the plane.

    Args:
        memorization, quality: what the axes show. The first is a share.
    """
    numbered = len(points) > _NAMED
    figure = Figure(figsize=(9 if numbered else 7, 5), dpi=120, layout="constrained")
    axis = figure.subplots()
    for number, point in enumerate(points):
        colour = _COLOURS[number % len(_COLOURS)]
        label = _text(f"{number + 1}  {point.model}" if numbered else point.model)
        axis.plot(point.quality, point.memorization, "o", color=colour, markersize=9, label=label)
    if numbered:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    axis.set_ylim(-0.04, max(0.1, *(1.15 * point.memorization for point in points)))
    least, most = min(point.quality for point in points), max(point.quality for point in points)
    beyond = max((most - least) / 3, 0.05 * abs(most))  # a difference of a percent must not look like a gulf
    axis.set_xlim(least - beyond, most + beyond)
    for place, label in _labels(points, axis, numbered):
        axis.annotate(label, place, xytext=(8, 6), textcoords="offset points", fontsize=9, color=INK)
    axis.set_ylabel(_text(memorization))
    axis.set_xlabel(_text(quality))
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.annotate("better", (0.015, 0.02), xycoords="axes fraction", fontsize=9, color=MUTED)
    figure.savefig(path, format="png")


def _labels(points: Sequence[Point], axis: Axes, numbered: bool) -> list[tuple[tuple[float, float], str]]:
    """What stands beside which place of the plane: names, or numbers, those of points that lie together in one."""
    if not numbered:
        return [((point.quality, point.memorization), _text(point.model)) for point in points]
    together: list[list[int]] = []
    in_axes = [axis.transLimits.transform((point.quality, point.memorization)) for point in points]
    for number, place in enumerate(in_axes):
        for some in together:
            if all(abs(place - in_axes[some[0]]) < _NEAR):
                some.append(number)
                break
        else:
            together.append([number])
    return [
        ((points[some[0]].quality, points[some[0]].memorization), ", ".join(str(number + 1) for number in some))
        for some in together
    ]


def _text(said: str) -> str:
    """Text for matplotlib, to which a dollar begins a formula."""
    return said.replace("$", r"\$")
