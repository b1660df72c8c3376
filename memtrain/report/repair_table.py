"""The table of `memtrain bench repair`: a row a method, over models."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from memtrain.core.files import written_aside
from memtrain.report.mitigation import beyond_reach, copy_rates, spread

BEFORE = "before"  # the row of the models as they are


@dataclass(frozen=True)
class RepairFigures:
    """What one repaired model came to; None: not measured. Rates and shares are of 1."""

    row: str
    model: str
    copies: float  # of forgotten pictures
    attacked: float  # the same after an attack
    beyond_reach: float | None  # of these, nearer than an attack brings back what was never trained on
    reference_attacked: float  # what the attack brings back of pictures that were never trained on
    untouched: float  # copies of canaries that are not on the list
    heldout_loss: float
    heldout_change: float | None  # to the same model before, as a share
    drift: float | None  # RMSE of latents of watched captions' pictures, before to after
    margin: float | None  # their caption margin
    steps: int | None
    cost: float | None  # of the training's
    reached: bool | None  # the mark of the repair's own


_COLUMNS = {
    "copies": ("copies", ".1%"),
    "under attack": ("attacked", ".1%"),
    "of them beyond its reach": ("beyond_reach", ".1%"),
    "never seen, under attack": ("reference_attacked", ".1%"),
    "untouched canaries": ("untouched", ".1%"),
    "held-out loss, change": ("heldout_change", "+.2%"),
    "drift of kept captions": ("drift", ".3f"),
    "their caption margin": ("margin", "+.1%"),
    "steps": ("steps", ".0f"),
    "cost, of the training": ("cost", ".1%"),
}


def read_figures(
    row: str,
    model: str,
    attacked: Path,
    plain: Path,
    repaired: Path | None,
    before: RepairFigures | None,
    training: float,
) -> RepairFigures:
    """Of one model, from its evaluations under attack and without, and from what its repair wrote.

    Args:
        attacked, plain: folders with an evaluation.json. The second draws more never-trained captions: its cut holds.
        repaired: a repair.json; None: the model before.
        before: the figures of the model before.
        training: forward passes that the training took.
    """
    models = {
        folder: json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))[0] for folder in (attacked, plain)
    }
    groups = {(folder, group["group"]): group for folder, model in models.items() for group in model["groups"]}
    of_attacked = models[attacked]["groups"], attacked / "rows.parquet", models[plain].get("cut")
    rates, rates_attacked = (copy_rates(*of_attacked, attacked=under) for under in (False, True))
    beyond = beyond_reach(*of_attacked)
    own = {} if repaired is None else json.loads(repaired.read_text(encoding="utf-8"))
    drift = list(own.get("kept_drift", {}).values())
    loss = groups[plain, "reference"]["denoising_loss"]
    return RepairFigures(
        row=row,
        model=model,
        copies=rates["forgotten"],
        attacked=rates_attacked["forgotten"],
        beyond_reach=beyond.get("forgotten"),
        reference_attacked=rates_attacked["reference"],
        untouched=groups[plain, "untouched"]["copy_rate"],
        heldout_loss=loss,
        heldout_change=None if before is None else loss / before.heldout_loss - 1,
        drift=sum(drift) / len(drift) if drift else None,
        margin=own.get("alignment", {}).get("after"),
        steps=own.get("steps"),
        cost=own["passes"]["steps"] / training if own else None,
        reached=own.get("reached"),
    )


def table(found: Sequence[RepairFigures], rows: Sequence[str]) -> str:
    """A Markdown table, a line a row that has figures, in this order."""
    lines = [["method", "models", *_COLUMNS], ["---"] + ["--:"] * (len(_COLUMNS) + 1)]
    for row in rows:
        mine = [one for one in found if one.row == row]
        if mine:
            cells = [spread([getattr(one, name) for one in mine], form) for name, form in _COLUMNS.values()]
            lines.append([row.replace("_", " "), str(len(mine)), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(out: Path, found: Sequence[RepairFigures], rows: Sequence[str], caption: str) -> str:
    """Write table.md and results.csv; the text of the first."""
    text = f"{table(found, rows)}\n\n{caption}"
    with written_aside(out / "table.md") as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    with written_aside(out / "results.csv") as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([field.name for field in fields(RepairFigures)])
        writer.writerows(list(vars(one).values()) for one in found)
    return text
