"""`memtrain shards check | index | pack | draw | duplicates`"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from memtrain.cli.arguments import Parser
from memtrain.cli.checks import check_new_file
from memtrain.cli.distributors import add_distributor, add_parts, cores, part_from, progress, taken_from
from memtrain.core.files import written_aside
from memtrain.data.escaping import printable
from memtrain.data.paths import check_empty, check_pictures
from memtrain.data.sources import local_shards

_LISTED = 20  # faults, failures and groups on the terminal
_TABLE_ROWS = 50
_DRAWN_SIDE = 64  # px, at which pictures are read to see whether they can be

HEADINGS = {
    "damage": "damaged",
    "no_image": "no\nimage",
    "no_caption": "no\ncaption",
    "duplicate_key": "key\ntwice",
    "unreadable_image": "bad\nimage",
    "empty_caption": "empty\ncaption",
    "caption_not_utf8": "not\nUTF-8",
    "bad_json": "bad\njson",
    "duplicate_within": "same\ninside",
    "duplicate_across": "same\nacross",
    "stats_missing": "no\nstats",
    "stats_disagree": "stats\ndiffer",
}


def shards(argv: list[str]) -> None:
    """Run `memtrain shards …`. Exits with 1 where `check` finds that training would lose something.

    Raises:
        ValueError: what the user can mend.
    """
    arguments = vars(_parser().parse_args(argv))
    arguments.pop("task")(**arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("memtrain shards", description="Check, index, write and deduplicate LAION-style shards.")
    tasks = parser.add_subparsers(metavar="check | index | pack | draw | duplicates", required=True)

    def task(run: Callable, name: str, summary: str) -> argparse.ArgumentParser:
        added = tasks.add_parser(name, help=summary, description=summary)
        added.set_defaults(task=run)
        return added

    def over_shards(added: argparse.ArgumentParser) -> None:
        added.add_argument("paths", nargs="+", metavar="PATH", help="a folder, a tar or a brace pattern")

    def with_workers(added: argparse.ArgumentParser) -> None:
        added.add_argument("--workers", type=int, default=cores(), help="processes (%(default)s)")

    added = task(_check, "check", "say what training would lose, by name; exit with 1 if anything")
    over_shards(added)
    with_workers(added)
    added.add_argument("--json", action="store_true", dest="as_json", help="print everything found, as json")
    added.add_argument("--no-decode", action="store_false", dest="decode", help="trust the images: faster")

    added = task(_index, "index", "write the index of each shard, and hashes of its images, beside it")
    over_shards(added)
    add_distributor(added, cores())
    add_parts(added)
    added.add_argument("--no-hashes", action="store_false", dest="hashed", help="faster; duplicates stay unknown")

    added = task(_pack, "pack", "write pictures with captions as shards")
    added.add_argument("source", type=Path, help="a folder of images and .txt, or a .parquet, .jsonl or .csv")
    added.add_argument("out", type=Path, help="a new folder")
    added.add_argument("--shard-size", type=int, default=10_000, help="rows of a shard (%(default)s)")
    added.add_argument("--resolution", type=int, help="px: scale the short side down, re-encode as JPEG")
    added.add_argument("--caption-column", default="caption", help="of a table (%(default)s)")
    added.add_argument("--path-column", default="path", help="of a table, relative to it (%(default)s)")
    add_distributor(added, 1)
    add_parts(added)

    added = task(_draw, "draw", "draw a small corpus from a large one, by seed")
    over_shards(added)
    added.add_argument("out", type=Path, help="a new folder")
    added.add_argument("--count", type=int, required=True, help="samples")
    added.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    added.add_argument("--shard-size", type=int, default=10_000, help="rows of a shard (%(default)s)")

    added = task(_duplicates, "duplicates", "find exact and near duplicates (PDQ)")
    over_shards(added)
    with_workers(added)
    added.add_argument("--out", type=Path, required=True, help="a new .parquet, a row a sample")
    added.add_argument("--distance", type=int, default=31, help="of 256 bits, for near ones (%(default)s)")
    return parser


def _check(paths: list[str], workers: int, as_json: bool, decode: bool) -> None:
    found = local_shards(paths)
    from memtrain.data.check import check

    report = check(found, decode, workers, progress("Checking shards"))
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        _print_check(report)
    if report.loses:
        sys.exit(1)


def _print_check(report) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = report.as_dict()
    rows, total, faults = found["shards"], found["total"], report.faults
    kinds = [kind for kind in HEADINGS if total["faults"][kind]]
    ranked = sorted(range(len(rows)), key=lambda number: not any(rows[number]["faults"].values()))
    listed = [rows[number] for number in sorted(ranked[:_TABLE_ROWS])]  # where not all fit, those with faults
    table = Table("shard", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # columns of zeros are left out
    for heading in ["samples", "complete", *map(HEADINGS.get, kinds)]:
        table.add_column(heading, justify="right")
    for name, row in [*((shown(row["name"], 40), row) for row in listed), ("total", total)]:
        numbers = [row["samples"], row["complete"], *(row["faults"][kind] for kind in kinds)]
        table.add_row(Text(name), *map(str, numbers), end_section=row is listed[-1])
    console = Console(highlight=False)
    console.width = max(console.width, 160)  # the table is no wider than it has to be, and never squeezed
    console.print(table)
    if len(rows) > len(listed):
        print(f"… and {len(rows) - len(listed)} more shards, --json lists all")
    if not report.decoded:
        print("images were not decoded")
    lost = sum(fault.lost for fault in faults)
    print(f"{lost} faults that lose something, {len(faults) - lost} that do not")
    said = [(("kept", "lost")[fault.lost], shown(fault.name), shown(fault.cause)) for fault in faults]
    _print_some([f"{fate}  {name}: {cause}" for fate, name, cause in said], "--json lists all")


def _index(paths: list[str], hashed: bool, merge: bool, **options) -> None:
    distributor, part = taken_from(options), part_from(options)
    found = local_shards(paths)
    from memtrain.data.index import index_beside, write_indexes

    mine = [found[place].path for place in part.of(len(found))]
    if merge:
        lacking = [shard.name for shard in found if index_beside(shard.path, hashed) is None]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of {len(found)} shards have no index yet, such as {lacking[0]}; do the other parts "
                "first, or leave merge out to write them here"
            )
    done = list(progress("Indexing shards")(write_indexes(mine, hashed, distributor), len(mine)))
    counts = [one.result for one in done if one.result is not None]
    samples, skipped = (sum(count[column] for count in counts) for column in (0, 1))
    there = sum(not count[2] for count in counts)
    print(
        f"indexed {samples} samples in {len(counts)} shards, {skipped} skipped"
        + (f"; {there} were indexed already" if there else "")
    )
    _end_with_those_left([(str(mine[one.index]), one.failure) for one in done if one.failure])


def _end_with_those_left(left: list[tuple[str, str]]) -> None:
    """Name the shards that were left after some tries, and exit with 1 where there are any."""
    if left:
        print(f"left {len(left)} shards, the same command tries them again:")
        _print_some([f"{shown(name)}: {shown(why)}" for name, why in left], "the log names all")
        sys.exit(1)


def _pack(source: Path, out: Path, **options) -> None:
    distributor, part = taken_from(options), part_from(options)
    check_empty(out)
    check_pictures(source)
    from memtrain.data.pack import pack

    options |= {"distributor": distributor, "part": part}
    report = pack(source, out, **options, progress=progress("Packing"))
    where = shown(str(out)) if part.count == 1 else f"part {part}; `merge` makes {shown(str(out))} of all parts"
    print(f"wrote {report.samples} samples in {report.shards} shards: {where}")
    if report.ignored:
        print(f"left {report.ignored} files alone that are neither a picture nor the caption of one")
    if report.failures:
        print(f"left {len(report.failures)} pictures out:")
        lines = [f"{shown(name)}: {shown(why)}" for name, why in report.failures]
        _print_some(lines, "the parquet beside each shard lists all")


def _draw(paths: list[str], out: Path, count: int, **options) -> None:
    check_empty(out)
    from memtrain.data.draw import draw
    from memtrain.data.samples import ShardSamples

    passed = draw(ShardSamples(paths, _DRAWN_SIDE), out, count, **options, progress=progress("Drawing"))
    print(
        f"wrote {count} samples: {shown(str(out))}" + (f"; passed over {passed} that cannot be read" if passed else "")
    )


def _duplicates(paths: list[str], workers: int, out: Path, distance: int) -> None:
    check_new_file("--out", out)
    there = local_shards(paths)
    import pyarrow.parquet as pq

    from memtrain.data.duplicates import find_duplicates

    found = find_duplicates(there, distance, workers, progress("Hashing images"))
    with written_aside(out, shared=True) as aside:
        pq.write_table(found.groups, aside, compression="zstd")
    groups: dict[tuple[int, str], list[str]] = {}
    for row in found.groups.select(["group", "kind", "caption"]).to_pylist():
        groups.setdefault((row["group"], row["kind"]), []).append(row["caption"])
    print(f"{len(groups)} groups with {len(found.groups)} of {found.num_samples} samples: {shown(str(out))}")
    lines = [f"{len(captions)} {kind}  {shown(captions[0], 100)}" for (_, kind), captions in groups.items()]
    _print_some(lines, "the parquet lists all")
    if found.unreadable:
        print(f"{len(found.unreadable)} that could not be hashed:")
        lines = [f"{shown(name)}: {shown(why)}" for name, why in found.unreadable]
        _print_some(lines, "memtrain shards check --json lists all")


def _print_some(lines: list[str], rest: str) -> None:
    for line in lines[:_LISTED]:
        print(f"  {line}")
    if len(lines) > _LISTED:
        print(f"  … and {len(lines) - _LISTED} more, {rest}")


def shown(text: str, limit: int = 200) -> str:
    """Text from a corpus, safe on a terminal: what is not printable is escaped, what is long is cut."""
    return printable(text if len(text) <= limit else f"{text[: limit - 1]}…")
