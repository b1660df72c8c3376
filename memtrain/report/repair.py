"""What a repair did: curves, pictures before and after, and a page of its own. One file, without scripts."""

from __future__ import annotations

import csv
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from memtrain.audit.mitigate.comparison import BeforeAfter
from memtrain.audit.repair.repairing import Look, Repaired
from memtrain.core.copies import is_copy, latent_rmse
from memtrain.core.files import written_aside
from memtrain.data.escaping import as_cell
from memtrain.report.before_after import draw_before_after
from memtrain.report.thumbnails import picture_of

_COLOURS = {"forgotten": "#c0392b", "never": "#6b7280", "kept": "#2c7fb8"}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{heading}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #1f2430; --muted: #5c6370; --line: #d8dbe0; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14161b; --ink: #e6e8ec; --muted: #a0a7b4; --line: #3a3f4a; }}
}}
body {{ margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin-top: 1.6rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child {{ text-align: left; overflow-wrap: anywhere; }}
.muted {{ color: var(--muted); }}
img {{ max-width: 100%; height: auto; background: #fff; }}
</style>
</head>
<body>
<h1>{heading}</h1>
<p>{said}</p>
<ul>{facts}</ul>
<h2>What was to be forgotten</h2>
<div class="wide">{forgotten}</div>
{pictures}
<h2>What was to stay</h2>
<p class="muted">Generations of kept captions before and after, from the same noise; those that share most words with
the forgotten ones.</p>
<div class="wide">{kept}</div>
{kept_pictures}
<h2>On the way</h2>
{curves}
</body>
</html>
"""
_IMAGE = '<div class="wide"><img src="{}" alt="{}"></div>'


def write_report(
    folder: Path,
    repaired: Repaired,
    originals: np.ndarray,
    originals_latents: np.ndarray,
    decoded: dict[str, tuple[np.ndarray, np.ndarray]],
    heading: str,
    facts: Sequence[str],
) -> None:
    """Write curves.csv, curves.png, before_after.png, kept.png and report.html.

    Args:
        originals: (N, height, width, 3) uint8, the pictures that were to be forgotten.
        originals_latents: (N, C, H, W) of them.
        decoded: pictures before and after, (N, G, height, width, 3) uint8 each, of `forgotten` and of `kept`.
        heading: of the page.
        facts: what is said below it, a line each.
    """
    _write_curves(folder / "curves.csv", repaired.looks, repaired.forgotten.captions)
    draw_curves(folder / "curves.png", repaired)
    pairs = _pairs(repaired, originals, decoded["forgotten"], originals_latents)
    draw_before_after(folder / "before_after.png", pairs, "after")
    if len(repaired.kept.captions):
        drift = repaired.kept.drift.tolist()
        kept = [
            BeforeAfter(caption, before, after, [0.0] * len(before), [apart] * len(after))
            for caption, before, after, apart in zip(repaired.kept.captions, *decoded["kept"], drift, strict=True)
        ]
        draw_before_after(folder / "kept.png", kept, "after", measure="RMSE to before")
    page = _page(folder, repaired, heading, facts)
    with written_aside(folder / "report.html") as aside:
        aside.write_text(page, encoding="utf-8", errors="replace")


def _pairs(
    repaired: Repaired, originals: np.ndarray, decoded: tuple[np.ndarray, np.ndarray], latents: np.ndarray
) -> list[BeforeAfter]:
    own, first, last = torch.from_numpy(latents), repaired.looks[0], repaired.looks[-1]
    pairs = []
    for number, caption in enumerate(repaired.forgotten.captions):
        made = (repaired.forgotten.before[number], repaired.forgotten.after[number])
        apart = [latent_rmse(drawn, own[number].expand_as(drawn)) for drawn in made]
        copies = [is_copy(distances, repaired.never_seen.cut).tolist() for distances in apart]
        before, after = (pictures[number] for pictures in decoded)
        scores = [[look.scores[number]] * len(before) for look in (first, last)]
        pairs.append(BeforeAfter(caption, before, after, *scores, originals[number], *copies))
    return pairs


def _write_curves(path: Path, looks: Sequence[Look], captions: Sequence[str]) -> None:
    """A row a look: means, and each caption's score and copies."""
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        named = [as_cell(caption) for caption in captions]
        writer.writerow(
            ["step", "score", "copies", "forgotten_loss", "drift"]
            + [f"score of {name}" for name in named]
            + [f"copies of {name}" for name in named]
        )
        for look in looks:
            copies = look.copies or [None] * len(captions)
            means = [look.step, look.score, look.copy_rate, look.forgotten_loss, look.drift]
            writer.writerow([*means, *look.scores, *copies])


def draw_curves(path: Path, repaired: Repaired) -> None:
    """Scores of each forgotten caption, copies, and how far kept captions have moved, over the steps."""
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    scores, copies, drift = figure.subplots(1, 3)
    looks, mark = repaired.looks, repaired.never_seen
    steps = [look.step for look in looks]
    for number in range(len(repaired.forgotten.captions)):
        scores.plot(steps, [look.scores[number] for look in looks], color=_COLOURS["forgotten"], alpha=0.35, lw=1)
    scores.plot(steps, [look.score for look in looks], color=_COLOURS["forgotten"], label="forgotten, mean")
    scores.axhline(mark.score, color=_COLOURS["never"], ls="--", label="never seen, mean")
    scores.set(title="Score at the first step", ylim=(0, None))
    known = [(look.step, look.copy_rate) for look in looks if look.copy_rate is not None]
    copies.plot(*zip(*known, strict=True), "o-", color=_COLOURS["forgotten"], label="forgotten")
    copies.axhline(mark.copy_rate, color=_COLOURS["never"], ls="--", label="never seen")
    copies.set(title="Generations that are copies", ylim=(-0.03, 1.03))
    moved = [(look.step, look.drift) for look in looks if look.drift is not None]
    if moved:
        drift.plot(*zip(*moved, strict=True), "o-", color=_COLOURS["kept"])
    drift.set(title="Kept predictions: mean square moved", ylim=(0, None))
    for axis in (scores, copies, drift):
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (scores, copies):
        axis.legend(frameon=False, fontsize=8)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


def _page(folder: Path, repaired: Repaired, heading: str, facts: Sequence[str]) -> str:
    first, last = repaired.looks[0], repaired.looks[-1]
    copies = [look.copies or [float("nan")] * len(look.scores) for look in (first, last)]
    forgotten = _table(
        ["prompt", "score before", "after", "copies before", "after"],
        [
            [caption, f"{one:.3f}", f"{other:.3f}", f"{was:.0%}", f"{now:.0%}"]
            for caption, one, other, was, now in zip(
                repaired.forgotten.captions, first.scores, last.scores, *copies, strict=True
            )
        ],
    )
    kept = _table(
        ["caption", "RMSE of latents, before to after"],
        [
            [caption, f"{apart:.3f}"]
            for caption, apart in zip(repaired.kept.captions, repaired.kept.drift.tolist(), strict=True)
        ],
    )

    def image(name: str) -> str:
        found = picture_of(folder / name)
        return "" if found is None else _IMAGE.format(found, name)

    return _PAGE.format(
        heading=html.escape(heading),
        said=html.escape(repaired.said),
        facts="".join(f"<li>{html.escape(fact)}</li>" for fact in facts),
        forgotten=forgotten,
        pictures=image("before_after.png"),
        kept=kept,
        kept_pictures=image("kept.png"),
        curves=image("curves.png"),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
