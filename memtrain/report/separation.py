"""How well one visit's score tells canaries from the reference set, by score, part of training and timestep.

`python -m memtrain.report.separation RUN… [--group train] [--over-loss] [--into docs/results.md --mark NAME]`, of runs
that differ in nothing but the seed, best without exclusion: `exclusion=none score=both reference.batch_size=16`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pyarrow.compute as pc
import torch

from memtrain.core.exclusion import GROUP_NAMES, REFERENCE
from memtrain.core.scores import ANCHORED, MAGNITUDE, SCORES
from memtrain.core.statistics import auc, timestep_bin
from memtrain.data.ledger import read_about, read_ledger
from memtrain.report.table import put_between_marks

PARTS, BINS = 4, 5  # of training, of the schedule
DIFFERENCE = f"{ANCHORED} − {MAGNITUDE}"
LOW_LOSS = "low loss"  # by itself, which costs no forward and `exclusion=iet_agc` goes by


def separation(run: Path, group: str, over_loss: bool) -> dict[str, np.ndarray]:
    """The AUC of a group's visits against those of the reference set, by score. (PARTS, BINS + 1) each

    The last column is the mean of the bins, whose scores are of different sizes; `nan` where a group has no visit.

    Args:
        run: its folder.
        group: canary; or train, ordinary samples, of which nothing is memorized where they are seen a few times.
        over_loss: of score / sqrt(loss), which `exclusion=evidence` goes by.

    Raises:
        ValueError: the run has no ledger, or no visit of one of the groups was scored.
    """
    about = read_about(run)
    columns = {name: about.column(name) for name in SCORES if name in (about.score, about.second)}
    rows = read_ledger(run).to_table(["step", "timestep", "group", "loss", *columns.values()])
    step, timestep, loss, *scores = (
        rows[name].to_numpy().astype(np.float64) for name in ("step", "timestep", "loss", *columns.values())
    )
    values = {name: score / np.sqrt(loss) if over_loss else score for name, score in zip(columns, scores, strict=True)}
    if not over_loss:
        values[LOW_LOSS] = -loss
    bins = timestep_bin(torch.from_numpy(timestep).long(), about.num_timesteps, BINS).numpy()
    cell = (step * PARTS // (step.max() + 1)).astype(np.int64) * BINS + bins
    sides = [pc.equal(rows["group"], name).to_numpy() for name in (group, GROUP_NAMES[REFERENCE])]
    found = {}
    for name, value in values.items():
        told = [side & np.isfinite(value) for side in sides]  # null where it was not taken
        if not all(side.any() for side in told):
            raise ValueError(
                f"{run}: no visit of {group} and reference samples has a score; train with canaries.count=5 "
                "reference.count=200 reference.batch_size=16, or so"
            )
        areas = [auc(*(torch.from_numpy(value[side & (cell == c)]) for side in told)) for c in range(PARTS * BINS)]
        by_bin = np.array(areas).reshape(PARTS, BINS)
        found[name] = np.concatenate([by_bin, by_bin.mean(1, keepdims=True)], axis=1)
    if len(columns) == len(SCORES):
        found[DIFFERENCE] = found[ANCHORED] - found[MAGNITUDE]
    return found


def table(runs: Sequence[Path], group: str, over_loss: bool) -> str:
    """A Markdown table, a line for each score and part of training: mean ± standard deviation over the runs.

    Raises:
        ValueError: see `separation`; or the runs took different scores, or on different schedules.
    """
    found = [separation(run, group, over_loss) for run in runs]
    num_timesteps = read_about(runs[0]).num_timesteps
    if any(read_about(run).num_timesteps != num_timesteps for run in runs) or any(
        of.keys() != found[0].keys() for of in found
    ):
        raise ValueError("runs of one table take the same scores on the same schedule; give the others another table")
    starts = [number * num_timesteps // BINS for number in range(BINS)]
    heads = ["score", "training", *(f"t ≥ {start}" for start in starts), "mean"]
    lines = [heads, ["---", "---"] + ["--:"] * (BINS + 1)]
    for name in found[0]:
        areas = np.stack([of[name] for of in found])  # (runs, PARTS, BINS + 1)
        form = "+.2f" if name == DIFFERENCE else ".2f"
        for part in range(PARTS):
            cells = [_spread(areas[:, part, column].tolist(), form) for column in range(BINS + 1)]
            lines.append([name, f"quarter {part + 1}", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _spread(values: Sequence[float], form: str) -> str:
    """The mean ± standard deviation of the runs; of a single one the value alone, a dash where one is not known."""
    if any(map(math.isnan, values)):
        return "–"
    return format(fmean(values), form) + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="A Markdown table: AUC of canaries' visits against the reference's.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs of several seeds")
    parser.add_argument("--group", default="canary", choices=("canary", "train"), help="whose visits (%(default)s)")
    parser.add_argument("--over-loss", action="store_true", help="of score / sqrt(loss)")
    parser.add_argument("--into", type=Path, help="put it between the marks of this file instead of printing it")
    parser.add_argument("--mark", default="separation", help="its marks: <!-- NAME: begin --> (%(default)s)")
    arguments = parser.parse_args()
    try:
        made = table(arguments.runs, arguments.group, arguments.over_loss)
        if arguments.into is None:
            print(made)
            return
        text = arguments.into.read_text(encoding="utf-8")
        marks = (f"<!-- {arguments.mark}: {edge} -->" for edge in ("begin", "end"))
        arguments.into.write_text(put_between_marks(text, made, *marks), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
