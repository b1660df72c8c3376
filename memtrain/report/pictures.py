"""Pictures of samples: training images beside generations, and grids."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memtrain.core.copies import is_copy

INK, MUTED, ALARM = "#1f2430", "#6b7280", "#c0392b"


def _axes(rows: int, columns: int, label_inches: float = 2.2, side_inches: float = 1.25) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of places for pictures, and room for a text before each row."""
    width, height = label_inches + columns * side_inches, rows * (side_inches + 0.22) + 0.35
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=label_inches / width, right=0.995, bottom=0.02, top=1 - 0.32 / height, wspace=0.06, hspace=0.2
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, axes


def _label(axis: Axes, caption: str) -> None:
    """Write a caption before a row, cut after four lines."""
    text = textwrap.fill(caption, 24, max_lines=4, placeholder=" …").replace("$", r"\$")
    axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9, color=INK, labelpad=8)


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():  # captions come in scripts that matplotlib's font lacks; it draws boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path)


def samples_of_picture(count: int) -> str:
    """`333 samples of this picture`, where a picture is shown that the corpus holds more than once; else nothing."""
    return f"{count} samples of this picture" if count > 1 else ""


def draw_samples(path: Path, rows: Sequence[tuple[str, np.ndarray, np.ndarray, Sequence[float]]], cut: float) -> None:
    """Draw a row a canary: caption, training image, generations; a copy, see `core.copies`, is framed.

    Args:
        cut: the RMSE up to which a generation is a copy.
        rows: (caption, image (R, R, 3) uint8, generations (G, R, R, 3) uint8, RMSE of each).
    """
    columns = 1 + max(len(images) for _, _, images, _ in rows)
    figure, axes = _axes(len(rows), columns)
    for line, (caption, original, images, distances) in zip(axes, rows, strict=True):
        line[0].imshow(original)
        _label(line[0], caption)
        for axis, image, distance in zip(line[1:], images, distances, strict=False):
            axis.imshow(image)
            copied = is_copy(distance, cut)
            axis.set_xlabel(
                f"{'copy, ' if copied else ''}RMSE {distance:.2f}",
                fontsize=7,
                color=ALARM if copied else MUTED,
                labelpad=2,
            )
            if copied:
                for spine in axis.spines.values():
                    spine.set(visible=True, color=ALARM, linewidth=2)
    axes[0, 0].set_title("training image", fontsize=9, color=INK)
    bound = f"RMSE ≤ {cut:.3g}"
    wide = axes.shape[1] > 2  # a single generation has no room for more
    title = f"generations (framed: copies, {bound})" if wide else f"copy: {bound}"
    axes[0, 1].set_title(title, fontsize=9 if wide else 8, color=INK, loc="left")
    _save(figure, path)


def draw_grid(path: Path, prompts: Sequence[str], images: np.ndarray) -> None:
    """Draw a row a prompt, of images (prompts, columns, R, R, 3), uint8."""
    figure, axes = _axes(len(prompts), images.shape[1])
    for line, prompt, row in zip(axes, prompts, images, strict=True):
        _label(line[0], prompt)
        for axis, image in zip(line, row, strict=True):
            axis.imshow(image)
    _save(figure, path)
