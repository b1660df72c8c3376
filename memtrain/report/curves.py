"""`curves.png`: what was being memorized, what was excluded, what it cost."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = {"canary": "#c0392b", "train": "#2c7fb8", "reference": "#6b7280"}
LABELS = {"canary": "canaries", "train": "training samples", "reference": "reference (never trained on)"}


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Columns of a `metrics.csv` as (steps, values), without the rows in which a column is empty."""
    columns: dict[str, tuple[list[int], list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value not in ("", None):
                    steps, values = columns.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return columns


def draw_curves(metrics_csv: Path, path: Path) -> None:
    """Four panels over steps: score at high noise at fixed draws and live, excluded share, held-out loss."""
    columns = read_metrics(metrics_csv)
    figure = Figure(figsize=(12, 7.2), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, prefix, title in (
        (axes[0, 0], "val_score_high_noise", "Score at high noise, fixed draws, averaged weights"),
        (axes[0, 1], "score_high_noise", "Score at high noise, live"),
        (axes[1, 0], "excluded", "Excluded share of visits (reference: would be)"),
    ):
        for group, colour in COLOURS.items():
            if f"{prefix}/{group}" in columns:
                axis.plot(*columns[f"{prefix}/{group}"], color=colour, label=LABELS[group], linewidth=1.6, marker=".")
        axis.set_title(title, loc="left", fontsize=10)
    axes[1, 0].set_ylim(-0.02, 1.02)
    axes[0, 0].set_ylabel("text-conditional magnitude")
    if "heldout_loss" in columns:
        axes[1, 1].plot(*columns["heldout_loss"], color=COLOURS["reference"], linewidth=1.6, marker=".")
    axes[1, 1].set_title("Held-out loss", loc="left", fontsize=10)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)
