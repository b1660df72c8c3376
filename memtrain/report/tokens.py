"""Which words of a prompt make its score: a bar chart, and a page with the words shaded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from memtrain.audit.explain.explanation import Explanation

INK, MUTED, BAR = "#1f2430", "#6b7280", "#c0392b"
_LONGEST_LABEL = 24  # characters of a word in the chart

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --ink: #1f2430; --muted: #5b6472; --paper: #fff; --line: #d9dde3; --shade: 214 69 54 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8ec; --muted: #9aa3b0; --paper: #16181d; --line: #343a44; --shade: 222 84 68 }}
}}
body {{ margin: 0 auto; padding: 1rem; max-width: 46rem; color: var(--ink); background: var(--paper);
       font: 1rem/1.5 system-ui, sans-serif }}
h1 {{ font-size: 1.25rem }}
p.about, .score {{ color: var(--muted); font-size: .9rem }}
section {{ border-top: 1px solid var(--line); padding: .75rem 0 }}
p.prompt {{ font-size: 1.15rem; line-height: 2; margin: .25rem 0; overflow-wrap: anywhere }}
.prompt span {{ padding: .15rem .2rem; border-radius: .25rem;
              background: rgb(var(--shade) / calc(var(--w) * .65)) }}
.prompt span.cut {{ background: none; color: var(--muted); text-decoration: line-through }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .9rem }}
td, th {{ padding: .2rem .6rem .2rem 0; text-align: left; vertical-align: top; overflow-wrap: break-word }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
</style>
<h1>{title}</h1>
<p class="about">The darker a word, the more the score changes with it (norm of the gradient with respect to
its token embeddings); the darkest is the most significant of its own prompt. Struck through: beyond the
length that the model reads.</p>
{sections}
</html>
"""


def write_page(path: Path, explanations: Sequence[Explanation], title: str) -> None:
    """Write one self-contained HTML file: no script, nothing fetched; prompts are escaped."""
    sections = "\n".join(_section(explanation) for explanation in explanations)
    text = _PAGE.format(title=escape(title), sections=sections)
    path.write_text(text, encoding="utf-8", errors="replace")  # a lone surrogate from a file is no UTF-8


def _section(explanation: Explanation) -> str:
    """The HTML of one prompt: its words shaded by their significance, its score, and what edits change of it."""
    prompt, end, parts = explanation.prompt, 0, []
    highest = max((word.significance for word in explanation.ranked()), default=0.0) or 1.0
    for word in explanation.words:
        parts.append(escape(prompt[end : word.start]))
        if word.significance is None:
            parts.append(f'<span class="cut">{escape(word.text)}</span>')
        else:
            share, title = word.significance / highest, f"{word.significance:.4g}"
            parts.append(f'<span style="--w:{share:.3f}" title="{title}">{escape(word.text)}</span>')
        end = word.end
    shown = "".join(parts) + escape(prompt[end:]) or "(the empty prompt)"
    lines = [
        "<section>",
        f'<p class="prompt" dir="auto">{shown}</p>',
        f'<p class="score">score {explanation.score:.3f}</p>',
    ]
    if explanation.edits:
        lines.append(
            '<div class="wide"><table><tr><th class="number">score</th><th class="number">change</th>'
            "<th>word</th><th>prompt</th></tr>"
        )
        for edit in explanation.edits:
            word = f"{edit.word} → {edit.replacement}" if edit.replacement else f"without {edit.word}"
            lines.append(
                f'<tr><td class="number">{edit.score:.3f}</td>'
                f'<td class="number">{edit.score - explanation.score:+.3f}</td>'
                f'<td>{escape(word)}</td><td dir="auto">{escape(edit.prompt)}</td></tr>'
            )
        lines.append("</table></div>")
    return "\n".join([*lines, "</section>"])


def draw_significance(path: Path, explanation: Explanation) -> None:
    """Draw a bar a word, in the prompt's order."""
    words = [word for word in explanation.words if word.significance is not None]
    figure = Figure(figsize=(6.4, 1.1 + 0.28 * max(1, len(words))), dpi=110, layout="constrained")
    axis = figure.subplots()
    places = range(len(words))
    axis.barh(places, [word.significance for word in words], color=BAR, height=0.7)
    axis.set_yticks(places, [_label(word.text) for word in words], color=INK)
    axis.invert_yaxis()
    axis.set_xlabel("significance of the word", color=MUTED)
    axis.set_title(f"score {explanation.score:.2f}", loc="left", fontsize=10, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    with warnings.catch_warnings():  # prompts come in scripts that matplotlib's font lacks; it draws boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path)


def _label(text: str) -> str:
    """A word as the chart shows it: cut, and without what matplotlib would take for a formula."""
    cut = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
    return cut.replace("$", r"\$")
