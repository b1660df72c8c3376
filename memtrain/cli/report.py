"""`memtrain report RUN…`"""

from __future__ import annotations

from pathlib import Path

from memtrain.cli.shards import Parser


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
    arguments = parser.parse_args(argv)
    out = arguments.out or (arguments.runs[0] if len(arguments.runs) == 1 else Path()) / "report.html"
    if not out.parent.is_dir():
        raise ValueError(f"--out={out}: there is no folder {out.parent}; make it first")
    from memtrain.report.page import write_report

    write_report(arguments.runs, out)
    print(out)
