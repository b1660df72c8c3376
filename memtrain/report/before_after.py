"""Pictures of a prompt before and after a mitigation, side by side, from the same noise."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from memtrain.audit.mitigate.comparison import BeforeAfter

INK, MUTED, ALARM = "#1f2430", "#6b7280", "#c0392b"


def draw_before_after(path: Path, pairs: Sequence[BeforeAfter], method: str, measure: str = "score") -> None:
    """Draw a row a prompt: the training image where it is known, generations before, then those after.

    Args:
        measure: what the pairs' scores are.
    """
    count = max(len(pair.before) for pair in pairs)
    first = int(any(pair.original is not None for pair in pairs))
    shares = [1] * (first + count) + [0.2] + [1] * count  # a gap between before and after
    rows, label, side = len(pairs), 2.2, 1.25
    width, height = label + sum(shares) * side, rows * (side + 0.22) + 0.4
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.subplots(rows, len(shares), squeeze=False, width_ratios=shares)
    figure.subplots_adjust(
        left=label / width, right=0.995, bottom=0.03, top=1 - 0.36 / height, wspace=0.06, hspace=0.22
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for line, pair in zip(axes, pairs, strict=True):
        caption = textwrap.fill(pair.prompt, 24, max_lines=4, placeholder=" …").replace("$", r"\$")
        line[0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=9, color=INK, labelpad=8)
        if pair.original is not None:
            line[0].imshow(pair.original)
        _draw(line[first : first + count], pair.before, pair.scores_before, pair.copies_before, measure)
        _draw(line[first + count + 1 :], pair.after, pair.scores_after, pair.copies_after, measure)
    if first:
        axes[0, 0].set_title("training image", fontsize=9, color=INK)
    axes[0, first].set_title("before →", fontsize=9, color=INK, loc="left")
    axes[0, first + count + 1].set_title(f"{method} →".replace("$", r"\$"), fontsize=9, color=INK, loc="left")
    with warnings.catch_warnings():  # prompts come in scripts that matplotlib's font lacks; it draws boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path)


def _draw(
    axes: np.ndarray, images: np.ndarray, scores: Sequence[float], copies: Sequence[bool] | None, measure: str
) -> None:
    """Draw generations side by side, each with its score; copies, where it is known which are, are framed."""
    copies = copies if copies is not None else [False] * len(images)
    for axis, image, score, is_copy in zip(axes, images, scores, copies, strict=False):
        axis.imshow(image)
        said = f"copy, {measure} {score:.2f}" if is_copy else f"{measure} {score:.2f}"
        axis.set_xlabel(said, fontsize=7, color=ALARM if is_copy else MUTED, labelpad=2)
        if is_copy:
            axis.spines[:].set(visible=True, color=ALARM, linewidth=2)
