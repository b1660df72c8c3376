"""What `memtrain detect` found: plots, summary.json and the table on the terminal."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from memtrain.core.files import json_of, written_aside

if TYPE_CHECKING:
    from memtrain.audit.detect.detection import Detection

MEMORIZED, OTHER, INK = "#c0392b", "#2c7fb8", "#1f2430"
SHOWN = 8  # prompts in the plot of steps


def write_detection(folder: Path, detection: Detection, summary: dict) -> None:
    """Write `scores.parquet` with the flags, `summary.json` (nan is null) and the plots of the main score, these of
    prompts with finite scores."""
    from memtrain.audit.detect.parts import write_table

    write_table(folder / "scores.parquet", detection.table(summary["threshold"]))
    with written_aside(folder / "summary.json") as aside:
        aside.write_text(json_of(summary), encoding="utf-8")
    detection = detection.finite()
    labels = None if detection.labels is None else np.array(detection.labels)
    order = np.argsort(-detection.scores, kind="stable")[:SHOWN]
    values = detection.steps.get(detection.main)
    if values is None:
        values = detection.scores[:, None, None]
    draw_steps(
        folder / "steps.png",
        [detection.prompts[place] for place in order],
        values[order],
        values,
        detection.main,
    )
    draw_distributions(folder / "distributions.png", detection.scores, labels, summary["threshold"], detection.main)
    if labels is not None:
        draw_roc(folder / "roc.png", {name: detection.of(name) for name in detection.names}, labels)


def _plain(axis, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():  # prompts come in scripts that matplotlib's font lacks; it draws boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path)


def _short(prompt: str, width: int) -> str:
    """A prompt on one line, cut at a word, without control characters."""
    printable = "".join(letter if letter.isprintable() else " " for letter in prompt)
    return textwrap.shorten(printable, width, placeholder=" …") or printable[:width]


def draw_steps(path: Path, prompts: Sequence[str], top: np.ndarray, everything: np.ndarray, name: str) -> None:
    """Draw the score at each step of the top prompts, before the middle half of all prompts.

    With one step there is no curve: a row a prompt then, a dot a generation.

    Args:
        prompts: the top ones.
        top: scores of their n generations at k steps, (prompts, n, k).
        everything: those of all P prompts, (P, n, k).
        name: of the score.
    """
    labels = [_short(prompt, 44).replace("$", r"\$") for prompt in prompts]
    means = everything.mean(axis=1)  # (P, k)
    steps = np.arange(1, top.shape[2] + 1)
    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    low, middle, high = np.quantile(means, (0.25, 0.5, 0.75), axis=0)
    if len(steps) == 1:
        axis.axvspan(low[0], high[0], color=OTHER, alpha=0.15, linewidth=0, label="all prompts, middle half")
        axis.axvline(middle[0], color=OTHER, linewidth=1, label="all prompts, median")
        for row, generations in enumerate(top[:, :, 0]):
            axis.plot(
                generations,
                [row] * len(generations),
                "o",
                color=MEMORIZED,
                alpha=0.55,
                markersize=6,
                markeredgewidth=0,
            )
            axis.plot(generations.mean(), row, "|", color=INK, markersize=14, markeredgewidth=2)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel(name)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower right", frameon=False, fontsize=8)
        _plain(axis, f"{name} at the first step: the top prompts, a dot a generation, their mean")
    else:
        axis.fill_between(steps, low, high, color=OTHER, alpha=0.15, linewidth=0, label="all prompts, middle half")
        axis.plot(steps, middle, color=OTHER, linewidth=1, label="all prompts, median")
        shades = np.linspace(1, 0.35, len(labels))
        for label, generations, shade in zip(labels, top, shades, strict=True):
            axis.plot(steps, generations.mean(axis=0), color=MEMORIZED, alpha=shade, marker=".", label=label)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
        _plain(axis, f"{name} at each step: the top prompts, mean of generations")
    _save(figure, path)


def draw_distributions(
    path: Path, scores: np.ndarray, labels: np.ndarray | None, threshold: float | None, name: str
) -> None:
    """Draw the score's distribution, of memorized and other prompts where labels tell them, and the threshold."""
    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axis = figure.subplots()
    groups = [("prompts", OTHER, scores)]
    if labels is not None:
        groups = [("other", OTHER, scores[~labels]), ("memorized", MEMORIZED, scores[labels])]
    edges = np.histogram_bin_edges(scores, bins=40)
    for title, colour, values in groups:
        weights = np.full(len(values), 1 / len(values))
        axis.hist(values, bins=edges, weights=weights, color=colour, alpha=0.55, label=f"{title} ({len(values)})")
    if threshold is not None and math.isfinite(threshold):
        axis.axvline(threshold, color=INK, linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3g}")
    axis.set_xlabel(name)
    axis.set_ylabel("share of its group")
    axis.legend(frameon=False, fontsize=8)
    _plain(axis, f"{name}, mean of generations and steps")
    _save(figure, path)


def roc(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at each distinct threshold, rising from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    last_of_value = np.append(np.diff(scores[order]) != 0, True)
    true, false = np.cumsum(labels[order])[last_of_value], np.cumsum(~labels[order])[last_of_value]
    return np.append(0, false / false[-1]), np.append(0, true / true[-1])


def draw_roc(path: Path, scores: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Draw the ROC curve of each score, on a logarithmic FPR axis: what matters is at its left end."""
    figure = Figure(figsize=(6.4, 5), dpi=110, layout="constrained")
    axis = figure.subplots()
    left = 0.5 / (~labels).sum()  # half of the smallest FPR that can be told from 0
    for name, values in scores.items():
        fpr, tpr = roc(values, labels)
        axis.step(np.maximum(fpr, left), tpr, where="post", linewidth=1.6, label=name)
    diagonal = np.geomspace(left, 1, 100)
    axis.plot(diagonal, diagonal, color="#6b7280", linestyle=":", linewidth=1, label="chance")
    if left < 0.01:
        axis.axvline(0.01, color=INK, linestyle="--", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlim(left, 1)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel(f"false-positive rate (of {(~labels).sum()} others; the left edge is none)")
    axis.set_ylabel(f"true-positive rate (of {labels.sum()} memorized)")
    axis.legend(frameon=False, fontsize=8, loc="best")
    _plain(axis, "ROC")
    _save(figure, path)


def show_summary(summary: dict) -> str:
    """The summary as a table for the terminal. Prompts are shown without control characters."""
    rate = summary["prompts_per_second"]
    speed = "all found in the folder" if rate is None else f"{rate:.2f} prompts/s"
    lines = [f"{summary['prompts']} prompts, {summary['evaluations_per_prompt']} network evaluations each, {speed}"]
    if summary["truncated"]:
        lines.append(f"{summary['truncated']} are longer than the text encoder reads; their end was not scored")
    lines += ["", *_score_lines(summary)]
    if summary["threshold"] is not None:
        lines += [
            "",
            f"{summary['main_score']} >= {summary['threshold']:.4g}: {summary['flagged']} prompts flagged",
        ]
    lines += ["", f"highest {summary['main_score']}"]
    lines += [f"{entry['score']:9.3f}  {_short(entry['prompt'], 90)}" for entry in summary["top"][:SHOWN]]
    return "\n".join(lines)


def _score_lines(summary: dict) -> list[str]:
    """A line a score: how well it separates, where labels tell, else its quantiles."""
    figures = summary["scores"]
    if "auc" not in figures[summary["main_score"]]:
        head = f"{'score':<20}{'min':>9}{'median':>9}{'max':>9}{'evaluations alone':>19}"
        return [head] + [
            f"{name:<20}{of['quantiles']['min']:>9.3f}{of['quantiles']['median']:>9.3f}{of['quantiles']['max']:>9.3f}"
            f"{of['evaluations_per_prompt_alone']:>19}"
            for name, of in figures.items()
        ]
    max_fpr = figures[summary["main_score"]]["at_fpr"][0]["max_fpr"]
    head = f"{'score':<20}{'AUC':>18}{f'TPR@{max_fpr:.2g}FPR':>18}{'best accuracy':>18}{'evaluations alone':>19}"
    lines = [head]
    for name, of in figures.items():
        lines.append(f"{name:<20}{_three(of)}{of['evaluations_per_prompt_alone']:>19}")
        lines += [f"  {_short(group, 16):<18}{_three(own)}" for group, own in of.get("groups", {}).items()]
    return [*lines, "95 % bootstrap intervals; the FPR does not exceed the one named"]


def _three(of: dict) -> str:
    """AUC, TPR and accuracy of a score, each with its interval."""
    figures = of["auc"], of["at_fpr"][0]["tpr"], of["best_accuracy"]
    texts = (f"{figure['value']:.3f} [{figure['low']:.2f} {figure['high']:.2f}]" for figure in figures)
    return "".join(f"{text:>18}" for text in texts)
