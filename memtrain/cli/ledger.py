"""`memtrain ledger suspects | show`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from memtrain.cli.arguments import Parser
from memtrain.cli.checks import check_new_file
from memtrain.cli.shards import shown
from memtrain.core.files import written_aside
from memtrain.data.paths import check_ledger


def ledger(argv: list[str]) -> None:
    """Run `memtrain ledger …`.

    Raises:
        ValueError: what the user can mend.
    """
    arguments = vars(_parser().parse_args(argv))
    arguments.pop("task")(**arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("memtrain ledger", description="Say from a run's ledger which pictures look memorized.")
    tasks = parser.add_subparsers(metavar="suspects | show", required=True)

    def task(run: Callable, name: str, summary: str) -> argparse.ArgumentParser:
        added = tasks.add_parser(name, help=summary, description=summary)
        added.set_defaults(task=run)
        added.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
        added.add_argument("--top", type=int, default=20, help="rows on the terminal (%(default)s)")
        added.add_argument(
            "--score", choices=("magnitude", "anchored"), help="judge by this one of a run with score=both (its rule's)"
        )
        return added

    summary = "write the keys of all samples of the pictures that look memorized, for data.exclude_keys"
    added = task(_suspects, "suspects", summary)
    added.add_argument("--out", type=Path, required=True, help="a new .parquet, a row a sample, the worst first")
    added.add_argument(
        "--false-positive-rate",
        type=float,
        default=0.01,
        help="share of the pictures that are not memorized and may be named all the same (%(default)s)",
    )
    task(_show, "show", "print the pictures that look memorized most")
    return parser


def _suspects(run: Path, top: int, out: Path, false_positive_rate: float, score: str | None) -> None:
    check_new_file("--out", out)
    check_ledger(run)
    import pyarrow.parquet as pq

    from memtrain.audit.suspects import judge

    judged = judge(run, score)
    found = judged.suspects(false_positive_rate)
    listed = judged.every_sample(found, _unvisited(run, found["key"].to_pylist()))
    with written_aside(out, shared=True) as aside:
        pq.write_table(listed, aside, compression="zstd")
    _say(judged)
    by_chance = false_positive_rate * len(judged.table)
    print(
        f"{len(found)} of {len(judged.table)} pictures look memorized, {by_chance:.0f} would by chance at a "
        f"false-positive rate of {false_positive_rate:g}; their {len(listed)} samples: {shown(str(out))}"
    )
    _print_table(found, top)


def _unvisited(run: Path, keys: list[str]):
    """Duplicates of suspects that the ledger may not name, since the run has not come to them; None: not known."""
    from omegaconf import OmegaConf

    from memtrain.audit.suspects import duplicates_in_corpus
    from memtrain.data.remote import ShardMissing

    try:
        data = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))["data"]
        return duplicates_in_corpus(data, keys)
    except (KeyError, TypeError, OSError, ValueError, ShardMissing) as error:
        why = f"config.yaml has no {error}" if isinstance(error, KeyError) else str(error)
        print(
            f"WARNING: the corpus was not asked ({why}): of each picture, the list names the samples that the ledger "
            "names",
            file=sys.stderr,
        )
        return None


def _show(run: Path, top: int, score: str | None) -> None:
    check_ledger(run)
    from memtrain.audit.suspects import judge

    judged = judge(run, score)
    _say(judged)
    _print_table(judged.table, top)


def _say(judged) -> None:
    share = "" if judged.sample == 1 else f", {judged.sample:.0%} of all, drawn"
    print(
        f"{judged.rows} rows{share}, {judged.steps} steps; "
        f"samples that are duplicates of one another count as one picture, under the key of the first; "
        f"p: rank among the {judged.compared_with} pictures that are compared with"
    )
    if not judged.has_reference:
        print(
            "WARNING: the run scored no reference set. Pictures are compared with one another, so that a "
            "false-positive rate of 0.01 names the highest 1 %, memorized or not; set reference.count=200 "
            "reference.batch_size=16",
            file=sys.stderr,
        )


def _print_table(found, top: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("key", "group", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("samples", "visits", "counted", "evidence", "p", "mean\nscore", "excluded"):
        table.add_column(heading, justify="right")
    for row in found.slice(0, top).to_pylist():
        table.add_row(
            Text(shown(row["key"], 60)),
            row["group"],
            str(row["samples"]),
            str(row["visits"]),
            str(row["counted_visits"]),
            f"{row['evidence']:.2f}",
            f"{row['p_value']:.2g}",
            f"{row['mean_score']:.3g}",
            f"{row['excluded_share']:.0%}",
        )
    if len(found):
        console = Console(highlight=False)
        console.width = max(console.width, 140)
        console.print(table)
    if len(found) > top:
        print(f"… and {len(found) - top} more")
