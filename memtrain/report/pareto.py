"""What a sweep came to: `pareto.png`, a table of its trials, and which of them to take."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.table import Table
from rich.text import Text

from memtrain.report.pictures import ALARM, INK, MUTED

_LINE = "#2c7fb8"


@dataclass(frozen=True)
class Tried:
    """A trial of a sweep. Less is better of both figures; they are None where it was not finished."""

    name: str
    setting: str  # its overrides, as a shell takes them
    state: str  # finished, given up, failed, waiting, going on
    step: int  # of its newest figures
    memorization: float | None
    quality: float | None


def finished(tried: Sequence[Tried]) -> list[Tried]:
    """The trials that have both figures."""
    return [one for one in tried if one.memorization is not None and one.quality is not None]


def front(tried: Sequence[Tried]) -> list[Tried]:
    """The Pareto front, best quality first: trials that no other is as good as in both figures and better in one."""
    ordered = sorted(finished(tried), key=lambda one: (one.quality, one.memorization))
    return [
        one
        for one in ordered
        if not any(
            other.memorization <= one.memorization
            and other.quality <= one.quality
            and (other.memorization, other.quality) != (one.memorization, one.quality)
            for other in ordered
        )
    ]


def choose(tried: Sequence[Tried], tolerance: float) -> Tried | None:
    """The least memorization among trials whose quality is within `tolerance`, a share, of the best.

    None where none has finished. Of several alike, the one of better quality. It lies on the front.
    """
    ordered = finished(tried)
    if not ordered:
        return None
    best = min(one.quality for one in ordered)
    near = [one for one in ordered if one.quality <= best + tolerance * abs(best)]
    return min(near, key=lambda one: (one.memorization, one.quality))


def why(tried: Sequence[Tried], tolerance: float) -> str:
    """A sentence on the choice and its rule."""
    chosen = choose(tried, tolerance)
    if chosen is None:
        return "No trial has finished, so there is nothing to take."
    best = min(finished(tried), key=lambda one: (one.quality, one.memorization))
    return (
        f"Take {chosen.name}: {chosen.setting or 'no setting of its own'}. It has the lowest copy rate "
        f"({chosen.memorization:.1%}) among trials whose held-out loss ({chosen.quality:.4f}) is within "
        f"{tolerance:.0%} of the best ({best.quality:.4f}, {best.name})."
    )


def table(tried: Sequence[Tried], tolerance: float) -> Table:
    """Trials that finished, best quality first, then the others; the front and the choice are marked."""
    on_front, chosen = front(tried), choose(tried, tolerance)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # fits into 80 columns
    shown.add_column("")
    shown.add_column("trial", no_wrap=True)
    shown.add_column("setting", overflow="fold")
    for name in ("copy rate,\ncanaries", "held-out\nloss", "steps"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    rest = [one for one in tried if one.memorization is None]
    done = sorted(finished(tried), key=lambda one: (one.quality, one.memorization))
    for one in [*done, *rest]:
        mark = "take" if one is chosen else "front" if one in on_front else ""
        shown.add_row(
            mark,
            one.name,
            Text(_short(one.setting)),  # no markup: settings are the user's own text
            "–" if one.memorization is None else f"{one.memorization:.1%}",
            "–" if one.quality is None else f"{one.quality:.4f}",
            str(one.step),
            "" if one.state == "finished" else one.state,
            style="bold" if one is chosen else "",
        )
    return shown


def write_csv(path: Path, tried: Sequence[Tried], tolerance: float) -> None:
    """Write the trials as a csv, a line each, with whether it is on the front and whether it is to be taken."""
    on_front, chosen = front(tried), choose(tried, tolerance)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*Tried.__dataclass_fields__, "on_front", "taken"])
        writer.writeheader()
        for one in tried:
            writer.writerow(asdict(one) | {"on_front": one in on_front, "taken": one is chosen})


def draw_pareto(path: Path, tried: Sequence[Tried], tolerance: float, memorization: str, quality: str) -> None:
    """Draw trials that finished, the front through them, and the choice. The best corner is the lower left one.

    Args:
        tolerance: of the choice; the band within it is shaded.
        memorization, quality: what the axes show. The first is a share.

    Raises:
        ValueError: none has finished.
    """
    done, on_front, chosen = finished(tried), front(tried), choose(tried, tolerance)
    if chosen is None:
        raise ValueError("no trial has finished, so there is no Pareto front to draw")
    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    best = min(one.quality for one in done)
    worst = max(one.quality for one in done)
    beyond = max((worst - best) / 8, 0.01 * abs(best))
    within = best + tolerance * abs(best)
    axis.axvspan(best - beyond, within, color=_LINE, alpha=0.08, linewidth=0)
    axis.annotate(
        f"within {tolerance:.0%} of the best", (0, 1), xycoords="axes fraction",
        xytext=(4, -12), textcoords="offset points", fontsize=8, color=MUTED,
    )  # fmt: skip
    axis.step(
        [one.quality for one in on_front], [one.memorization for one in on_front], where="post", color=_LINE,
        linewidth=1.2, label=f"Pareto front ({len(on_front)})",
    )  # fmt: skip
    others = [one for one in done if one not in on_front]
    for points, style in ((others, {"color": MUTED, "alpha": 0.6}), (on_front, {"color": _LINE})):
        axis.plot([one.quality for one in points], [one.memorization for one in points], "o", markersize=7, **style)
    axis.plot(
        chosen.quality, chosen.memorization, "o", markersize=13, markerfacecolor="none", markeredgecolor=ALARM,
        markeredgewidth=2, label=f"to take: {chosen.name}",
    )  # fmt: skip
    for one in on_front:
        axis.annotate(
            _text(f"{one.name}\n{_short(one.setting)}"), (one.quality, one.memorization), xytext=(8, 5),
            textcoords="offset points", fontsize=7.5, color=INK,
        )  # fmt: skip
    highest = max(0.1, *(one.memorization for one in done))
    axis.set_ylim(-0.04 * highest, 1.2 * highest)
    axis.set_xlim(best - beyond, worst + 2 * beyond)
    axis.set_ylabel(_text(memorization))
    axis.set_xlabel(_text(quality))
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    left = len(tried) - len(done)
    title = f"{len(done)} trials finished" + (f", {left} given up, failed, waiting or going on" if left else "")
    axis.set_title(title, loc="left", fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(path, format="png")


def _short(setting: str) -> str:
    """A setting without the groups of its keys, a line an override."""
    parts = (part.partition("=") for part in shlex.split(setting))
    return "\n".join(f"{key.rpartition('.')[2]} {value}" for key, _, value in parts)


def _text(said: str) -> str:
    """Text for matplotlib, to which a dollar begins a formula."""
    return said.replace("$", r"\$")
