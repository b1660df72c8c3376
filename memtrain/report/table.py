"""A table of finished runs, and its place in a text.

`python -m memtrain.report.table RUN… [--over-seeds] [--into docs/results.md] [--mark NAME]`
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev


def marks_of(name: str) -> tuple[str, str]:
    """The lines of a text between which the table of this name stands."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


BEGIN, END = marks_of("results")
BEGIN_SEEDS, END_SEEDS = marks_of("seeds")
COLUMNS = (
    "run",
    "copy rate, canaries",
    "copy rate, reference",
    "excluded, canaries",
    "excluded, other training samples",
    "held-out loss",
    "AUC at high noise",
    "steps",
    "samples/s",
)


def _show(value: float | None, form: str) -> str:
    """A number in this format; a dash where there is none."""
    return "–" if value is None else format(value, form)


def row(folder: Path) -> list[str]:
    """Cells of one run, from its `summary.json`. The run is named by its folder, with `_` for a space."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return [
        folder.resolve().name.replace("_", " "),
        _with_interval(summary),
        _show(summary["copy_rate"]["reference"], ".1%"),
        _show(summary["score"]["canary"]["excluded_fraction"], ".1%"),
        _show(summary["score"]["train"]["excluded_fraction"], ".1%"),
        _show(summary["heldout_loss"], ".4f"),
        _show(summary["auc_canary_vs_reference"], ".3f"),
        str(summary["steps"]),
        _show(summary["samples_per_second"], ".0f"),
    ]


def _with_interval(summary: dict) -> str:
    """The copy rate of canaries, with its 95 % interval over the canaries of this run; ± is over seeds alone."""
    own = ((summary.get("copies") or {}).get("own") or {}).get("canary") or {}
    interval = f" ({100 * own['low']:.0f} to {100 * own['high']:.0f})" if own.get("low") is not None else ""
    return _show(summary["copy_rate"]["canary"], ".1%") + interval


def results_table(folders: list[Path]) -> str:
    """A Markdown table, a run a line, in the order given."""
    lines = [COLUMNS, ["---"] + ["--:"] * (len(COLUMNS) - 1), *(row(folder) for folder in folders)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


COLUMNS_OVER_SEEDS = (
    "setting",
    "seeds",
    "copy rate, canaries",
    "excluded, canaries",
    "excluded, other training samples",
    "held-out loss",
    "steps/s",
)


def _spread(values: Sequence[float | None], form: str) -> str:
    """The mean ± standard deviation over the seeds; a single one has no deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return format(fmean(known), form) + (f" ± {format(stdev(known), form)}" if len(known) > 1 else "")


def table_over_seeds(folders: list[Path]) -> str:
    """A Markdown table, a line for the runs that differ in nothing but the seed: folders SETTING_seedN.

    Raises:
        ValueError: a folder of another name.
    """
    settings: dict[str, list[dict]] = {}
    for folder in folders:
        name = re.fullmatch(r"(.+)_seed\d+", folder.resolve().name)
        if name is None:
            raise ValueError(f"a run over seeds lies in a folder SETTING_seedN, got {folder}")
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        settings.setdefault(name[1].replace("_", " "), []).append(summary)
    lines = [COLUMNS_OVER_SEEDS, ["---"] + ["--:"] * (len(COLUMNS_OVER_SEEDS) - 1)]
    for setting, runs in settings.items():
        excluded = {group: [run["score"][group]["excluded_fraction"] for run in runs] for group in ("canary", "train")}
        rates = [run["samples_per_second"] * run["steps"] / run["samples_seen"] for run in runs]
        lines.append(
            [
                setting,
                str(len(runs)),
                _spread([run["copy_rate"]["canary"] for run in runs], ".1%"),
                _spread(excluded["canary"], ".1%"),
                _spread(excluded["train"], ".1%"),
                _spread([run["heldout_loss"] for run in runs], ".4f"),
                _spread(rates, ".2f"),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def put_between_marks(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """A text with the table between its marks. Raises ValueError where it has none."""
    if begin not in text or end not in text:
        raise ValueError(f"the text has no {begin} … {end} to put the table between")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="A Markdown table of finished runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders with a summary.json")
    parser.add_argument("--over-seeds", action="store_true", help="a line for all runs SETTING_seedN")
    parser.add_argument("--into", type=Path, help="put it between the marks of this file instead of printing it")
    parser.add_argument("--mark", help="their name, <!-- NAME: begin -->; results, or seeds with --over-seeds")
    arguments = parser.parse_args()
    missing = [str(run) for run in arguments.runs if not (run / "summary.json").is_file()]
    if missing:
        parser.error(f"no summary.json in {missing[0]}; name the folder of a finished run")
    table = (table_over_seeds if arguments.over_seeds else results_table)(arguments.runs)
    if arguments.into is None:
        print(table)
    else:
        text = arguments.into.read_text(encoding="utf-8")
        marks = marks_of(arguments.mark or ("seeds" if arguments.over_seeds else "results"))
        arguments.into.write_text(put_between_marks(text, table, *marks), encoding="utf-8")


if __name__ == "__main__":
    main()
