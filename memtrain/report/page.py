"""`report.html`: one self-contained page about one run or several; it opens as a file, without a network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2.utils import htmlsafe_json_dumps
from PIL import Image

from memtrain import __version__
from memtrain.core.files import written_aside
from memtrain.report.comparison import differences, table
from memtrain.report.copies import ALL_KINDS, draw_doses
from memtrain.report.figures import figures_of, run_colour, scatter
from memtrain.report.pictures import samples_of_picture
from memtrain.report.run import Run, read_run, settings
from memtrain.report.thumbnails import jpeg, picture_of, samples_by_key
from memtrain.report.verdict import PLANTED, Sentence, baseline_of, verdict

EMPTY: Mapping[str, int] = MappingProxyType({})
ASSETS = Path(__file__).with_name("assets")
_ORDINARY, _CANARIES = 18, 12  # so many cards of the most memorized pictures of a run
_TAGS = {
    "train": "training picture",
    "canary": "canary",
    "sacrificed": "sacrificed canary",
    "reference": "reference",
}
_DRAWN_SIDE = 1400  # px, of what is drawn for the page
_PICTURED_RUNS = 8  # more runs than that are shown without their pictures: the page has to stay small


@dataclass(frozen=True)
class Card:
    """A training picture on the page, by its first sample. All texts are as untrusted as the corpus."""

    key: str
    group: str
    image: str | None  # data URI
    caption: str | None
    numbers: str
    memorized: bool  # looks so


@dataclass(frozen=True)
class Picture:
    """A picture that the run drew itself."""

    title: str
    about: str
    image: str  # data URI


@dataclass(frozen=True)
class Section:
    """What the page says of one run."""

    run: Run
    colour: str
    sentences: list[Sentence]
    remarks: list[str]
    memorized: list[Card]
    excluded: list[Card]
    pictures: list[Picture]
    settings: dict[str, str]


def write_report(folders: Sequence[Path], path: Path, copies: Mapping[str, int] = EMPTY) -> None:
    """Write the page about these runs' folders.

    Args:
        copies: how often the corpus holds a sample, by key, for those that it holds more than once.

    Raises:
        ValueError: a folder is no run.
    """
    page = render([read_run(folder) for folder in folders], copies)
    with written_aside(path) as aside:
        # names of files may hold bytes that are no UTF-8; they are shown as \udc80
        aside.write_text(page, encoding="utf-8", errors="backslashreplace", newline="\n")


def render(runs: list[Run], copies: Mapping[str, int] = EMPTY) -> str:
    """The page as text; all that comes from data is escaped."""
    baseline = baseline_of(runs)
    sections = [
        _section(run, number, baseline, copies, pictures=len(runs) <= _PICTURED_RUNS) for number, run in enumerate(runs)
    ]
    figures = figures_of(runs)
    scatters = [
        (number, scatter(run, run.ledger)) for number, run in enumerate(runs) if run.ledger and run.ledger.points
    ]
    data = [asdict(figure) for figure in figures]
    for number, figure in scatters:
        data.append({**asdict(figure), "id": f"scatter-{number}"})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = _asset("uPlot.min.css") + _asset("page.css")
    script = _asset("uPlot.iife.min.js") + _asset("page.js")
    return environment.get_template("page.html").render(
        title=runs[0].name if baseline is None else f"{len(runs)} runs",
        version=__version__,
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        style=style,
        script=script,
        data=htmlsafe_json_dumps(data, dumps=_strict_json),
        sections=sections,
        baseline=baseline,
        comparison=None if baseline is None else table(runs, baseline),
        differences=differences(runs) if baseline is not None else [],
        figures=[figure for figure in figures if figure.id != "plane"],
        plane=next((figure for figure in figures if figure.id == "plane"), None),
        doses=_doses(runs) if baseline is not None else None,
        scatters=dict(scatters),
        tags=_TAGS,
    )


def _doses(runs: list[Run]) -> Picture | None:
    """Copies by repeats, a line a run; None: no run's canaries have several doses."""
    curves = {run.name: run.doses[ALL_KINDS] for run in runs if ALL_KINDS in run.doses}
    curves = {name: curve for name, curve in curves.items() if len(curve.repeats) > 1}
    if not curves:
        return None
    buffer = io.BytesIO()
    draw_doses(buffer, curves)
    about = "Share of a canary's generations that copy its picture, with 95 % intervals over canaries, a line a run."
    return Picture("Copies by repeats", about, jpeg(Image.open(buffer), _DRAWN_SIDE))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8") + "\n"


def _hash(text: str) -> str:
    """The source that a Content-Security-Policy allows: this very text, so that no script from data could run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _strict_json(value: Any, **options: Any) -> str:
    """JSON without NaN, which no browser reads, and in ASCII."""
    return json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"), **options)


def _section(run: Run, number: int, baseline: Run | None, copies: Mapping[str, int], pictures: bool) -> Section:
    """Put together what the page says of one run; `pictures`: with those of samples and those that it drew."""
    remarks = list(run.remarks)
    memorized, excluded = _chosen(run)
    images: dict[str, tuple[str, str]] = {}
    if pictures:
        keys = dict.fromkeys(row["key"] for row in [*memorized, *excluded])
        images, remark = samples_by_key(run.config, list(keys))
        remarks += [remark] if remark else []
    return Section(
        run,
        run_colour(number),
        verdict(run, baseline),
        remarks,
        [_card(run, row, images, copies) for row in memorized],
        [_card(run, row, images, copies) for row in excluded],
        _pictures(run) if pictures else [],
        settings(run.config),
    )


def _pictures(run: Run) -> list[Picture]:
    """The pictures in a run's folder that are there, and are whole."""
    grids = sorted((run.folder / "grids").glob("*.png"))
    return [
        Picture(title, about, image)
        for path, title, about in (
            (run.folder / "samples.png", "Canaries and generations", "Training images beside generations."),
            (
                run.folder / "doses.png",
                "Copies by repeats",
                "Share of a canary's generations that copy its picture, with 95 % intervals over canaries.",
            ),
            (
                run.folder / "memorized.png",
                "Most memorized, generated",
                "Training images beside generations.",
            ),
            *((path, "Newest sample grid", f"{path.name}: generations from fixed prompts.") for path in grids[-1:]),
        )
        if (image := picture_of(path)) is not None
    ]


def _chosen(run: Run) -> tuple[list[dict], list[dict]]:
    """Rows of the most memorized pictures, canaries among them, and of those excluded most often."""
    view = run.ledger
    if view is None:
        return [], []
    if view.judged is None:
        return [], view.excluded
    table = view.judged.table  # the most memorized first; p-values of several may be equal
    is_planted = pc.is_in(table["group"], pa.array(PLANTED)).to_numpy()
    places = np.union1d(np.flatnonzero(~is_planted)[:_ORDINARY], np.flatnonzero(is_planted)[:_CANARIES])
    return table.take(places).to_pylist(), view.excluded


def _card(run: Run, row: dict, images: dict[str, tuple[str, str]], copies: Mapping[str, int]) -> Card:
    """The card of a picture: of what was judged of it, or, without that, of how often it was excluded."""
    key, view = row["key"], run.ledger
    image, caption = images.get(key, (None, None))
    if caption is None and key in run.canaries:
        caption = run.canaries[key]["caption"] or None
    share = row["excluded_share"] if "excluded_share" in row else row["excluded"] / row["visits"]
    numbers = [f"{row['visits']} visits", f"excluded {share:.0%}"]
    if "p_value" in row:
        evidence = f"evidence {row['evidence']:.2f}, p {row['p_value']:.2g}"
        numbers = [evidence, f"score {row['mean_score']:.2f}", *numbers]
    if run.memorized_at.get(key) is not None:
        numbers.append(f"copied since step {run.memorized_at[key]}")
    if row["samples"] > 1:
        numbers.insert(0, samples_of_picture(row["samples"]))
    if key in copies:
        numbers.append(f"{copies[key]} times in the corpus")
    told = view.judged is not None and view.judged.has_reference
    memorized = told and row.get("p_value", 1) <= view.false_positive_rate
    return Card(key, row["group"], image, caption, " · ".join(numbers), memorized)
