"""`curves.png`: what was being memorized, what was excluded, what it cost."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memtrain.core.scores import SCORES

COLOURS = {"canary": "#c0392b", "sacrificed": "#d98e04", "train": "#2c7fb8", "reference": "#6b7280"}
LABELS = {
    "canary": "canaries",
    "sacrificed": "sacrificed canaries",
    "train": "training samples",
    "reference": "reference (never trained on)",
}
Curve = tuple[list[int], list[float]]  # steps and values
NO_LOOKS: Mapping[str, Curve] = MappingProxyType({})
_LIVE, _FIXED = "live, one draw", "fixed draws"
_PANELS = (  # title, {column: (label, colour)}, y limits, band of quantiles
    (
        "Generations that are copies",
        {f"copy_rate/{g}": (LABELS[g], COLOURS[g]) for g in ("canary", "sacrificed", "reference")}
        | {"memorized_canaries": ("canaries memorized so far", "#1f2430")},
        (-0.02, 1.02),
        None,
    ),
    (
        "Excluded share of visits (reference: would be)",
        {f"excluded/{g}": (LABELS[g], colour) for g, colour in COLOURS.items()},
        (-0.02, 1.02),
        None,
    ),
    ("Held-out loss", {"heldout_loss": ("reference set, fixed draws", COLOURS["reference"])}, None, None),
    (
        "Score at high noise, live (shaded: 5 to 95 %)",
        {f"score_high_noise/{g}": (LABELS[g], colour) for g, colour in COLOURS.items()},
        None,
        ("canary", "reference"),
    ),
    (
        "Score at high noise, fixed draws, averaged weights",
        {f"val_score_high_noise/{g}": (LABELS[g], colour) for g, colour in COLOURS.items()},
        None,
        None,
    ),
    (
        "Canaries against reference, at high noise",
        {
            "auc_canary_vs_reference": (f"AUC, {_FIXED}", "#c0392b"),
            "auc_live": (f"AUC, {_LIVE}", "#e59a91"),
            "tpr_at_1pct_fpr": (f"TPR at 1 % FPR, {_FIXED}", "#1f5f8b"),
            "tpr_at_1pct_fpr_live": (f"TPR at 1 % FPR, {_LIVE}", "#9cc4e0"),
        }
        | {f"{score}_auc_canary_vs_reference": (f"AUC of the {score} score, {_FIXED}", "#5b2a86") for score in SCORES},
        (-0.02, 1.02),
        None,
    ),
)


def read_metrics(path: Path) -> dict[str, Curve]:
    """The columns of a `metrics.csv` as (steps, values), without the rows in which a column is empty."""
    columns: dict[str, Curve] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value not in ("", None):
                    steps, values = columns.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return columns


def draw_curves(metrics_csv: Path, path: Path, looks: Mapping[str, Curve] = NO_LOOKS) -> None:
    """Draw six panels over steps, the upper ones with a second axis in samples; a panel without data says so.

    Args:
        looks: curves that take the place of those in the file, by column: steps and values.
    """
    columns = {**read_metrics(metrics_csv), **looks}
    figure = Figure(figsize=(15, 7.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (title, curves, limits, band) in zip(axes.flat, _PANELS, strict=True):
        for group in band or ():
            _shade(axis, columns, group)
        found = {column: how for column, how in curves.items() if column in columns}
        for column, (label, colour) in found.items():
            steps, values = columns[column]
            marker = "." if len(steps) <= 60 else None
            axis.plot(steps, values, color=colour, label=label, linewidth=1.5, marker=marker, markersize=5)
        if not found:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="#6b7280", fontsize=9)
        if limits:
            axis.set_ylim(*limits)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if found:
            axis.legend(frameon=False, fontsize=8)
    last = max([1, *(steps[-1] for steps, _ in columns.values())])
    seen = columns.get("samples_seen")
    for axis in axes.flat:
        axis.set_xlim(-0.02 * last, 1.02 * last)
        axis.set_xlabel("step", fontsize=9)
        if axis in axes[0] and seen and seen[0][-1] and seen[1][-1]:
            a_step = seen[1][-1] / seen[0][-1]
            above = axis.secondary_xaxis("top", functions=(lambda x, k=a_step: x * k, lambda x, k=a_step: x / k))
            above.set_xlabel("samples seen", fontsize=8)
            above.tick_params(labelsize=7)
            above.spines["top"].set_visible(False)
    figure.savefig(path)


def _shade(axis: Axes, columns: dict[str, Curve], group: str) -> None:
    """Shade what lies between the 5 and 95 % quantiles of a group's scores, where they were measured."""
    low, high = (columns.get(f"score_quantile_high_noise/{group}/{q}") for q in ("0.05", "0.95"))
    if low and high:
        axis.fill_between(low[0], low[1], high[1], color=COLOURS[group], alpha=0.1, linewidth=0)
