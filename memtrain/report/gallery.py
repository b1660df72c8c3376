"""`gallery.html`: generations beside their training image, nearest first. One file, without scripts."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from memtrain.audit.evaluate.results import Match
from memtrain.report.thumbnails import jpeg

_SIDE, _QUALITY = 256, 92  # px, larger pictures are made smaller; of the JPEGs
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{heading}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fff; --card: #f4f5f7; --ink: #1f2430; --muted: #5c6370;
  --alarm: #b3261e; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14161b; --card: #1e2128; --ink: #e6e8ec; --muted: #a0a7b4; --alarm: #ff8a80; }}
}}
body {{ margin: 0 auto; max-width: 90rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.3rem; margin: .5rem 0; overflow-wrap: anywhere; }}
p {{ margin: .3rem 0; }}
ol {{ list-style: none; margin: 1rem 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }}
li {{ background: var(--card); border: 2px solid transparent; border-radius: .6rem; padding: .7rem;
  min-width: 0; }}
li.copy {{ border-color: var(--alarm); }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }}
figure {{ margin: 0; }}
img {{ width: 100%; height: auto; border-radius: .3rem; display: block; }}
figcaption, .muted {{ color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }}
.caption {{ overflow-wrap: anywhere; }}
.copy strong {{ color: var(--alarm); }}
</style>
</head>
<body>
<h1>{heading}</h1>
<p class="muted">{count} shown, nearest first. A copy (framed): {rule}.</p>
<ol>
{pairs}
</ol>
</body>
</html>
"""
_PAIR = """<li{mark}>
<div class="pair">
<figure><img src="{generated}" alt="{made}"><figcaption>{made}</figcaption></figure>
<figure><img src="{original}" alt="training image"><figcaption>training image</figcaption></figure>
</div>
<p><strong>{said}</strong></p>
<p class="caption">{caption}</p>
<p class="muted">{group} · {key}</p>
</li>"""


def _marks(pair: Match) -> list[str]:
    return [*(["copy"] if pair.is_copy else []), *(["under attack"] if pair.attacked else []), pair.said]


def write_gallery(path: Path, heading: str, rule: str, pairs: Sequence[Match]) -> None:
    """Write a page of pairs, in the order given. All text is shown as text.

    Args:
        heading: of the page.
        rule: what counts as a copy, in words.
    """
    shown = [
        _PAIR.format(
            mark=' class="copy"' if pair.is_copy else "",
            made="generation under attack" if pair.attacked else "generation",
            generated=jpeg(Image.fromarray(pair.generated), _SIDE, _QUALITY),
            original=jpeg(Image.fromarray(pair.original), _SIDE, _QUALITY),
            said=html.escape(", ".join(_marks(pair))),
            caption=html.escape(pair.caption),
            group=html.escape(pair.group),
            key=html.escape(pair.key),
        )
        for pair in pairs
    ]
    page = _PAGE.format(heading=html.escape(heading), count=len(pairs), rule=html.escape(rule), pairs="\n".join(shown))
    path.write_text(page, encoding="utf-8", errors="replace")  # keys of files may hold what no encoding has
