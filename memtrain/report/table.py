"""A table of finished runs, and its place in a text: `python -m memtrain.report.table RUN… [--into README.md]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
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
    return "–" if value is None else format(value, form)


def row(folder: Path) -> list[str]:
    """Cells of one run, from its `summary.json`. The run is named by its folder, with `_` for a space."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return [
        folder.resolve().name.replace("_", " "),
        _show(summary["copy_rate"]["canary"], ".1%"),
        _show(summary["copy_rate"]["reference"], ".1%"),
        _show(summary["score"]["canary"]["excluded_fraction"], ".1%"),
        _show(summary["score"]["train"]["excluded_fraction"], ".1%"),
        _show(summary["heldout_loss"], ".4f"),
        _show(summary["auc_canary_vs_reference"], ".3f"),
        str(summary["steps"]),
        _show(summary["samples_per_second"], ".0f"),
    ]


def results_table(folders: list[Path]) -> str:
    """Markdown, a run a line, in the order given."""
    lines = [COLUMNS, ["---"] + ["--:"] * (len(COLUMNS) - 1), *(row(folder) for folder in folders)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def put_between_marks(text: str, table: str) -> str:
    """`text` with `table` between its marks. Raises ValueError where it has none."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"the text has no {BEGIN} … {END} to put the table between")
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="A Markdown table of finished runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders with a summary.json")
    parser.add_argument("--into", type=Path, help="put it between the marks of this file instead of printing it")
    arguments = parser.parse_args()
    missing = [str(run) for run in arguments.runs if not (run / "summary.json").is_file()]
    if missing:
        parser.error(f"no summary.json in {missing[0]}; name the folder of a finished run")
    table = results_table(arguments.runs)
    if arguments.into is None:
        print(table)
    else:
        text = arguments.into.read_text(encoding="utf-8")
        arguments.into.write_text(put_between_marks(text, table), encoding="utf-8")


if __name__ == "__main__":
    main()
