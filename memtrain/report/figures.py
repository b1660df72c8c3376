"""The page's figures as plain data: lines of (x, y), and what they mean. The page's script draws them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from memtrain.core.scores import ANCHORED, MAGNITUDE, SCORES
from memtrain.report.curves import LABELS
from memtrain.report.ledger import BINS, LedgerView
from memtrain.report.run import Run

# Colours are names of the style sheet's variables, so that they follow the reader's light or dark mode.
GROUPS = {
    "canary": "canary",
    "sacrificed": "sacrificed",
    "train": "train",
    "reference": "reference",
}
NAMES = LABELS
_RUN_COLOURS = 8
_OTHERS = {"kept": "train", "excluded": "canary", "all": "reference"}


@dataclass(frozen=True)
class Series:
    """A line or a cloud of points in a figure."""

    name: str
    colour: str
    x: list[float]
    y: list[float | None]
    points: bool = False  # drawn as points, without a line
    dashed: bool = False
    faint: bool = False  # many points: see-through


@dataclass(frozen=True)
class FigureData:
    """A figure of the page, without how it is drawn."""

    id: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    note: str = ""
    y_min: float | None = None
    y_max: float | None = None
    scatter: bool = False  # high, on a logarithmic y axis
    labels: bool = False  # name each point beside it


def figures_of(runs: list[Run]) -> list[FigureData]:
    """The curves of one run by group, or of several by run, the ones without data left out."""
    made = _single(runs[0]) if len(runs) == 1 else _several(runs)
    return [figure for figure in made if figure.series]


def _single(run: Run) -> Iterable[FigureData]:
    """The figures of one run, a line a group, in the page's order."""
    step = "step"
    yield FigureData(
        "score-high-noise",
        "Score at high noise, live",
        step,
        "score",
        _by_group(run, "score_high_noise"),
        f"The {run.score} score, by which memorized samples come to stand above the others.",
    )
    for score in SCORES:  # one that is taken beside the rule's
        yield FigureData(
            f"{score}-high-noise", f"The other score, {score}, at high noise, live", step, "score",
            _by_group(run, f"{score}_score_high_noise"), "Taken beside the one that the rule goes by.",
        )  # fmt: skip
    yield FigureData(
        "excluded", "Excluded share of visits", step, "share", _by_group(run, "excluded"),
        "Reference samples are never trained on: theirs is the share that would have been excluded.", y_min=0,
    )  # fmt: skip
    yield FigureData(
        "heldout-loss",
        "Held-out loss",
        step,
        "loss",
        _named(run, {"heldout_loss": ("reference set", "reference")}),
    )
    yield FigureData(
        "copy-rate", "Generations that are copies", step, "share", _by_group(run, "copy_rate"),
        "Of generations from the captions of each group.", y_min=0,
    )  # fmt: skip
    yield FigureData(
        "auc", "How well the score at high noise tells canaries from the reference set", step, "share",
        _named(run, {
            "auc_canary_vs_reference": ("AUC, fixed draws", "train"),
            "auc_live": ("AUC, live, one draw", "reference"),
            "tpr_at_1pct_fpr": ("found at 1 % false positives, fixed draws", "canary"),
            "tpr_at_1pct_fpr_live": ("found at 1 % false positives, live", "sacrificed"),
        } | {
            f"{score}_{column}": (f"{name} of the {score} score", colour)
            for score in SCORES
            for column, name, colour in (
                ("auc_canary_vs_reference", "AUC, fixed draws,", "ink"),
                ("auc_live", "AUC, live,", "alarm"),
            )
        }),
        "An AUC of 0.5 is chance.", y_min=0, y_max=1,
    )  # fmt: skip
    yield FigureData(
        "val-score", "Score at high noise, fixed draws", step, "score",
        _by_group(run, "val_score_high_noise"),
        "The same noise and timesteps each time, averaged weights.",
    )  # fmt: skip
    yield FigureData("loss", "Loss by group", step, "loss", _by_group(run, "loss"))
    yield FigureData(
        "loss-kept", "Loss of kept and excluded samples", step, "loss",
        _named(run, {f"loss/{name}": (name, colour) for name, colour in _OTHERS.items()}),
    )  # fmt: skip
    yield FigureData("score", "Score, all timesteps", step, "score", _by_group(run, "score"))
    for group in ("train", "canary", "reference"):
        yield FigureData(
            f"score-quantiles-{group}",
            f"Quantiles of the score at high noise, {NAMES[group]}", step, "score",
            _by_number(run, f"score_quantile_high_noise/{group}"),
        )  # fmt: skip
    for prefix, title, of in (
        ("score_by_timestep/train", "Score by timestep, training samples", "score"),
        ("score_by_timestep/canary", "Score by timestep, canaries", "score"),
        ("score_by_timestep/reference", "Score by timestep, reference", "score"),
        ("threshold_by_timestep", "Threshold by timestep", "threshold"),
        ("excluded_by_timestep/train", "Excluded share of ordinary samples' visits by timestep", "share"),
        ("excluded_by_timestep/canary", "Excluded share of canaries' visits by timestep", "share"),
    ):
        yield FigureData(
            re.sub("[/_]", "-", prefix), title, step, of, _by_number(run, prefix),
            "Blue: low noise, red: high noise.", y_min=0 if of == "share" else None,
        )  # fmt: skip
    yield FigureData("speed", "Speed", step, "samples/s", _named(run, {"samples_per_second": ("samples/s", "train")}))
    yield FigureData(
        "scoring-share", "Share of the step spent scoring", step, "share",
        _named(run, {"scoring_share": ("scoring", "train")}), y_min=0,
    )  # fmt: skip


def _several(runs: list[Run]) -> Iterable[FigureData]:
    """The figures of several runs, a line a run, in the page's order."""
    yield plane(runs)
    for column, title, unit in (
        ("score_high_noise/canary", "Score of canaries at high noise, live", "score"),
        ("excluded/canary", "Excluded share of canaries' visits", "share"),
        ("excluded/train", "Excluded share of ordinary samples' visits", "share"),
        ("copy_rate/canary", "Generations from canaries' captions that are copies", "share"),
        ("heldout_loss", "Held-out loss", "loss"),
        ("auc_canary_vs_reference", "How well the score tells canaries from the reference set", "AUC"),
        ("samples_per_second", "Speed", "samples/s"),
    ):
        series = [
            Series(run.name, run_colour(number), *_finite(run.curves[column]))
            for number, run in enumerate(runs)
            if column in run.curves
        ]
        bounds = {"share": {"y_min": 0}, "AUC": {"y_min": 0, "y_max": 1}}.get(unit, {})
        yield FigureData(re.sub(r"[/_]", "-", column), title, "step", unit, series, **bounds)


def run_colour(number: int) -> str:
    return f"run{number % _RUN_COLOURS}"


def plane(runs: list[Run]) -> FigureData:
    """Memorization against quality, a point a run; empty where no run measured both."""
    series = [
        Series(run.name, run_colour(number), [run.last("heldout_loss")], [run.copy_rate("canary")], points=True)
        for number, run in enumerate(runs)
        if run.last("heldout_loss") is not None and run.copy_rate("canary") is not None
    ]
    return FigureData(
        "plane", "Memorization and quality", "held-out loss", "copy rate of canaries", series,
        "A point a run. Down is less memorized, left is better: a good rule goes down without going right.",
        labels=True,
    )  # fmt: skip


SHOWS = {  # where each score stands out
    MAGNITUDE: "By the magnitude, memorized samples lie above the reference at high noise, and of a UNet below it in "
    "the middle.",
    ANCHORED: "By the anchored score, how far the run has moved the prediction, memorized samples lie above the "
    "reference at every timestep.",
}


def scatter(run: Run, view: LedgerView) -> FigureData:
    """Score against timestep: some visits of each group, its median, and what they were held against."""
    centres = [(b + 0.5) * view.num_timesteps / BINS for b in range(BINS)]
    series = []
    for group, colour in GROUPS.items():
        if group not in view.points:
            continue
        of = view.points[group]
        scores = [round(score, 4) for score in of.scores.tolist()]
        series.append(Series(NAMES[group], colour, of.timesteps.tolist(), scores, points=True, faint=True))
        series.append(Series(f"{NAMES[group]}, median", colour, *_without_nan(centres, of.median)))
    if np.isfinite(view.reference_high).any():
        line = _without_nan(centres, view.reference_high)
        series.append(Series("99 % of the reference lies below", "ink", *line, dashed=True))
    if view.threshold is not None:
        line = _without_nan(centres, view.threshold)
        series.append(Series("threshold, median", "alarm", *line, dashed=True))
    return FigureData(
        "scatter", "Score against timestep", "timestep (right: more noise)", "score", series,
        f"Visits drawn at random over the whole run. {SHOWS[run.score]}", scatter=True,
    )  # fmt: skip


def _by_group(run: Run, prefix: str) -> list[Series]:
    """A line for each column `prefix/group` that the run has."""
    return _named(run, {f"{prefix}/{group}": (NAMES[group], colour) for group, colour in GROUPS.items()})


def _named(run: Run, columns: dict[str, tuple[str, str]]) -> list[Series]:
    """A line for each of these columns that the run has; column -> its name and colour."""
    return [
        Series(name, colour, *_finite(run.curves[column]))
        for column, (name, colour) in columns.items()
        if column in run.curves
    ]


def _by_number(run: Run, prefix: str) -> list[Series]:
    """A line for each column `prefix/number`, such as a timestep bin or a quantile, from low to high."""
    columns = [column for column in run.curves if column.rpartition("/")[0] == prefix]
    columns.sort(key=lambda column: float(column.rpartition("/")[2].lstrip("t")))
    last = max(1, len(columns) - 1)
    return [
        Series(column.rpartition("/")[2], f"bin{number * 9 // last}", *_finite(run.curves[column]))
        for number, column in enumerate(columns)
    ]


def _finite(curve: tuple[list[int], list[float]]) -> tuple[list[float], list[float | None]]:
    """The x and y of a curve for JSON, which has no NaN: a gap is null."""
    return list(curve[0]), [value if math.isfinite(value) else None for value in curve[1]]


def _without_nan(x: list[float], y: np.ndarray) -> tuple[list[float], list[float]]:
    """The x and y of a line, without its gaps."""
    pairs = [(a, round(float(b), 5)) for a, b in zip(x, y, strict=True) if np.isfinite(b)]
    return [a for a, _ in pairs], [b for _, b in pairs]
