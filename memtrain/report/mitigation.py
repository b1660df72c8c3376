"""The table of `memtrain bench mitigation`: a row a setting, over seeds; its csv, plane and dose curves."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from memtrain.core.copies import DEFAULT_FALSE_COPIES, copy_cut, is_copy
from memtrain.core.exclusion import CANARY, GROUP_NAMES, REFERENCE
from memtrain.core.files import written_aside
from memtrain.data.copies_file import CopyRow, read_copies
from memtrain.report.copies import counted, doses_by_kind, draw_doses, rate_of
from memtrain.report.plane import Point, draw_plane

EVALUATION = "evaluation/evaluation.json"  # in a run's folder, and the other files that are read here
_SSCD, _RMSE = "nearest_sscd", "latent_rmse"  # columns of the evaluation's rows, the second of a generation's own
_CANARY, _REFERENCE = GROUP_NAMES[CANARY], GROUP_NAMES[REFERENCE]


@dataclass(frozen=True)
class Figures:
    """What one run came to; None: not measured, or not yet. Rates and shares are of 1."""

    copies: float | None  # of canaries' generations, of their own picture
    attacked: float | None  # the same after an attack on the finished model
    beyond_reach: float | None  # of these, nearer than an attack brings back what was never trained on
    reference_attacked: float | None  # what an attack brings back of pictures that were never trained on
    nearest: float | None  # of canaries' generations, that are copies of any training picture
    heldout_loss: float | None
    distance: float | None  # Fréchet distance of generations to the training pictures
    kernel_distance: float | None  # the same without a bias
    excluded: float | None  # visits of ordinary samples
    excluded_canaries: float | None
    steps_per_second: float | None
    clip_score: float | None = None  # of generations from never-trained captions: what protection cost
    caption_margin: float | None = None  # the same by a judge, where there is no CLIP
    sscd_share: float | None = None  # of canaries' generations, whose largest SSCD over the training set is above 0.5
    sscd_95: float | None = None  # the 95th percentile of it; both as Somepalli et al. 2023 have it


@dataclass(frozen=True)
class Result:
    """A finished run of the table."""

    row: str
    seed: int
    figures: Figures
    generations: Sequence[CopyRow]  # those that copy rates count; () where the run lists none
    cut: float | None  # the distance within which a generation is a copy
    min_repeats: int
    all_generations: Sequence[CopyRow]  # of canaries with fewer repeats, too


def read_result(folder: Path, row: str, seed: int) -> Result:
    """What a run's folder says of it: summary.json, copies.csv, evaluation.json."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    judged: dict[str, Any] = summary.get("copies") or {}
    rows = read_copies(folder / "copies.csv") if (folder / "copies.csv").is_file() else []
    evaluation = folder / EVALUATION
    model = json.loads(evaluation.read_text(encoding="utf-8"))[0] if evaluation.is_file() else {"groups": []}
    rows_of = evaluation.with_name("rows.parquet")
    attacked = copy_rates(model["groups"], rows_of, judged.get("cut"), attacked=True)
    false_copies = judged.get("false_copies", DEFAULT_FALSE_COPIES)
    beyond = beyond_reach(model["groups"], rows_of, judged.get("cut"), false_copies)
    never = next((group for group in model["groups"] if group["group"] == _REFERENCE), {})
    seen, per_second = summary["samples_seen"], summary["samples_per_second"]
    min_repeats = judged.get("min_repeats", 1)
    return Result(
        row,
        seed,
        Figures(
            copies=summary["copy_rate"][_CANARY],
            attacked=attacked.get(_CANARY),
            beyond_reach=beyond.get(_CANARY),
            reference_attacked=attacked.get(_REFERENCE),
            nearest=judged.get("nearest", {}).get(_CANARY, {}).get("rate"),
            heldout_loss=summary["heldout_loss"],
            distance=model.get("frechet_distance"),
            kernel_distance=model.get("kernel_distance"),
            excluded=summary["score"]["train"]["excluded_fraction"],
            excluded_canaries=summary["score"][_CANARY]["excluded_fraction"],
            steps_per_second=per_second * summary["steps"] / seen if seen and per_second else None,
            clip_score=never.get("clip_score"),
            caption_margin=never.get("caption_margin"),
            **_of_sscd(rows_of),
        ),
        counted(rows, min_repeats),
        judged.get("cut"),
        min_repeats,
        rows,
    )


def copy_rates(
    groups: Sequence[Mapping[str, Any]], rows: Path, cut: float | None, attacked: bool
) -> dict[str, float | None]:
    """Copies among an evaluation's generations, of each group, at a cut that more generations have set.

    An attack is dear, so that an evaluation with one draws few never-trained captions, and few set no cut that lets
    one in a hundred count: where none of 16 may count, one in sixteen is to be expected.

    Args:
        groups: of the evaluation.
        rows: its rows.parquet.
        cut: an RMSE of latents; None, or where the evaluation has another measure: the evaluation's own.
        attacked: of the generations under attack, or of the others.
    """
    rates = {group["group"]: group.get("copy_rate_attacked" if attacked else "copy_rate") for group in groups}
    if cut is None or not rows.is_file() or _RMSE not in pq.read_schema(rows).names:
        return rates
    table = pq.read_table(rows, columns=[_RMSE, "group"], filters=pc.field("attacked") == attacked)
    for group in set(table["group"].to_pylist()):
        own = table.filter(pc.equal(table["group"], group))[_RMSE].to_numpy()
        rates[group] = float(np.mean(is_copy(own, cut)))
    return rates


def beyond_reach(
    groups: Sequence[Mapping[str, Any]], rows: Path, cut: float | None, false_copies: float = DEFAULT_FALSE_COPIES
) -> dict[str, float | None]:
    """The same under attack within the attack's reach alone, see `memtrain.audit.evaluate.judging.judge`, of which
    a cut of the run's own is the bound; see `copy_rates` for the arguments.

    Args:
        false_copies: share of never-trained pictures' generations that may lie within the reach.
    """
    if cut is None or not rows.is_file() or _RMSE not in pq.read_schema(rows).names:
        return {group["group"]: group.get("copy_rate_beyond_reach") for group in groups}
    of_reference = (pc.field("attacked")) & (pc.field("group") == _REFERENCE)
    described = pq.read_table(rows, columns=[_RMSE], filters=of_reference)[_RMSE].to_pylist()
    if not described:
        return {}
    reach = copy_cut(torch.tensor(described), cut, false_copies)
    return copy_rates(groups, rows, reach.distance, attacked=True)


def _of_sscd(rows: Path) -> dict[str, float]:
    """The figures of SSCD, where a model was evaluated by it; {} where it was not."""
    if not rows.is_file() or _SSCD not in pq.read_schema(rows).names:
        return {}
    table = pq.read_table(rows, columns=[_SSCD, "group", "attacked"], filters=pc.field("group") == _CANARY)
    values = [row[_SSCD] for row in table.to_pylist() if not row["attacked"]]
    if not values:
        return {}
    return {"sscd_share": float(np.mean(np.array(values) > 0.5)), "sscd_95": float(np.quantile(values, 0.95))}


# ---- over seeds


COLUMNS = {  # heading -> figure and its format
    "copies under attack": ("attacked", ".1%"),
    "of them beyond its reach": ("beyond_reach", ".1%"),
    "reference under attack": ("reference_attacked", ".1%"),
    "copies of any training picture": ("nearest", ".1%"),
    "held-out loss": ("heldout_loss", ".4f"),
    "kernel distance": ("kernel_distance", ".4f"),
    "excluded, ordinary samples": ("excluded", ".2%"),
    "excluded, canaries": ("excluded_canaries", ".1%"),
    "steps/s": ("steps_per_second", ".2f"),
    "CLIP score": ("clip_score", ".2f"),  # these four only where they were measured
    "caption margin": ("caption_margin", "+.1%"),
    "SSCD to the training set > 0.5": ("sscd_share", ".1%"),
    "its 95th percentile": ("sscd_95", ".3f"),
}
_SOMETIMES = ("clip_score", "caption_margin", "sscd_share", "sscd_95")


def spread(values: Sequence[float | None], form: str) -> str:
    """The mean ± standard deviation over seeds; a single one has no deviation, and none is a dash."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return format(fmean(known), form) + (f" ± {format(stdev(known), form)}" if len(known) > 1 else "")


def pooled(results: Sequence[Result], every: bool = False) -> list[CopyRow]:
    """The generations of several seeds; a canary that they have in common is one, so that an interval over canaries
    does not count it as several.

    Args:
        every: also those of canaries with few repeats.
    """
    numbers: dict[tuple[str, int], int] = {}  # a canary's first key and repeats -> its number here
    found = []
    for result in results:
        rows = result.all_generations if every else result.generations
        firsts: dict[int, str] = {}
        for row in rows:
            if row.canary is not None:
                firsts[row.canary] = min(row.key, firsts.get(row.canary, row.key))
        for row in rows:
            if row.canary is not None:
                row = replace(row, canary=numbers.setdefault((firsts[row.canary], row.repeats), len(numbers)))
            found.append(row)
    return found


def by_row(results: Sequence[Result], rows: Sequence[str]) -> dict[str, list[Result]]:
    """The results of each row, in the order of the rows; [] where it has none yet."""
    return {row: [result for result in results if result.row == row] for row in rows}


def table(results: Sequence[Result], rows: Sequence[str], seeds: int) -> str:
    """A Markdown table, a line a row; rows that have no result yet are there, too."""
    shown = {
        heading: (name, form)
        for heading, (name, form) in COLUMNS.items()
        if name not in _SOMETIMES or any(getattr(one.figures, name) is not None for one in results)
    }
    lines = [["setting", "seeds", "copies of canaries", "95 % over canaries", *shown]]
    lines.append(["---"] + ["--:"] * (len(lines[0]) - 1))
    for row, of in by_row(results, rows).items():
        rate = rate_of([one for one in pooled(of) if one.group == _CANARY])
        interval = "–" if rate is None or rate.low is None else f"{100 * rate.low:.1f} to {100 * rate.high:.1f}%"
        cells = [row.replace("_", " "), str(len(of)) if len(of) == seeds else f"{len(of)} of {seeds}"]
        cells += [spread([one.figures.copies for one in of], ".1%"), interval]
        cells += [spread([getattr(one.figures, name) for one in of], form) for name, form in shown.values()]
        lines.append(cells)
    return _as_markdown(lines)


def table_of_kinds(results: Sequence[Result], rows: Sequence[str]) -> str:
    """Copies of canaries of each kind, a line a row; empty where there is one kind, or none."""
    kinds = list(dict.fromkeys(one.kind for result in results for one in result.generations if one.group == _CANARY))
    if len(kinds) < 2:
        return ""
    lines = [["setting", *kinds], ["---"] + ["--:"] * len(kinds)]
    for row, of in by_row(results, rows).items():
        mine = [one for one in pooled(of) if one.group == _CANARY]
        rates = [rate_of([one for one in mine if one.kind == kind]) for kind in kinds]
        lines.append([row.replace("_", " "), *("–" if rate is None else rate.said() for rate in rates)])
    return _as_markdown(lines)


def _as_markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |" for cells in lines)


def write(
    out: Path, results: Sequence[Result], rows: Sequence[str], seeds: int, curves: Sequence[str], caption: str
) -> str:
    """Write table.md, results.csv, plane.png and dose_curves.png of the runs that are there; the text of the first.

    Args:
        curves: rows whose dose curves are drawn; [] draws all.
        caption: what follows the tables.
    """
    parts = [table(results, rows, seeds), table_of_kinds(results, rows), caption]
    text = "\n\n".join(part for part in parts if part)
    with written_aside(out / "table.md") as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    with written_aside(out / "results.csv") as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", *Figures.__dataclass_fields__, "cut"])
        writer.writerows([one.row, one.seed, *vars(one.figures).values(), one.cut] for one in results)
    of = by_row(results, rows)
    points = _points(of)
    if points:
        with written_aside(out / "plane.png") as aside:
            draw_plane(aside, points, "copies of canaries, share of generations", "held-out loss")
    doses = {row.replace("_", " "): doses_by_kind(pooled(of[row], every=True)).get("all") for row in curves or rows}
    known = {row: curve for row, curve in doses.items() if curve is not None}
    if known:
        chance = rate_of([row for result in results for row in result.generations if row.group == _REFERENCE])
        with written_aside(out / "dose_curves.png") as aside:
            draw_doses(aside, known, chance and chance.rate)
    return text


def _points(of: Mapping[str, Sequence[Result]]) -> list[Point]:
    """A row's place in the plane: means over its seeds. A row where one of both was not measured has none."""
    points = []
    for row, results in of.items():
        both = [(one.figures.copies, one.figures.heldout_loss) for one in results]
        known = [pair for pair in both if None not in pair]
        if known:
            copies, loss = (fmean(values) for values in zip(*known, strict=True))
            points.append(Point(row.replace("_", " "), copies, loss))
    return points
