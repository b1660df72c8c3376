"""`memtrain report RUN…`"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from memtrain.cli.arguments import Parser
from memtrain.cli.checks import check_folder_of
from memtrain.data.paths import GROUPS, check_file, check_run


def report(argv: list[str]) -> None:
    """Run `memtrain report …`.

    Raises:
        ValueError: what the user can mend.
    """
    parser = Parser(
        "memtrain report",
        description="One self-contained page about a run, finished or going on; several runs are compared.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, runs/NAME/ID")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="report.html: in the folder of one run, here for several"
    )
    parser.add_argument(
        "--duplicates",
        type=Path,
        metavar="FILE",
        help="of `memtrain shards duplicates`: says how often a sample is there",
    )
    arguments = parser.parse_args(argv)
    out = arguments.out or (arguments.runs[0] if len(arguments.runs) == 1 else Path()) / "report.html"
    check_folder_of("--out", out)
    for run in arguments.runs:
        check_run(run)
    if arguments.duplicates:
        check_file("--duplicates", arguments.duplicates, GROUPS)
    from memtrain.data.duplicates import read_groups
    from memtrain.report.page import write_report

    copies: dict[str, int] = {}
    if arguments.duplicates:
        groups = read_groups(arguments.duplicates, "--duplicates")
        sizes = Counter(groups["group"].to_pylist())
        copies = {row["key"]: sizes[row["group"]] for row in groups.to_pylist()}
    write_report(arguments.runs, out, copies)
    print(out)
