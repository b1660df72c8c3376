"""`memtrain shards check | index | pack | draw | duplicates | report`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from memtrain.cli.arguments import Parser
from memtrain.cli.distributors import add_distributor, add_parts, cores, part_from, taken_from
from memtrain.cli.listing import print_some, progress_bar, shown
from memtrain.cli.shard_audits import add_audits
from memtrain.data.paths import check_empty, check_pictures
from memtrain.data.sources import local_shards

_DRAWN_SIDE = 64  # px, at which pictures are read to see whether they can be


def shards(argv: list[str]) -> None:
    """Run `memtrain shards …`. Exits with 1 where `check` finds that training would lose something.

    Raises:
        ValueError: what the user can mend.
    """
    arguments = vars(parser().parse_args(argv))
    arguments.pop("task")(**arguments)


def parser() -> argparse.ArgumentParser:
    made = Parser("memtrain shards", description="Check, index, write and deduplicate LAION-style shards.")
    tasks = made.add_subparsers(metavar="check | index | pack | draw | duplicates | report", required=True)

    def task(run: Callable, name: str, summary: str) -> argparse.ArgumentParser:
        added = tasks.add_parser(name, help=summary, description=summary)
        added.set_defaults(task=run)
        return added

    def over_shards(added: argparse.ArgumentParser) -> None:
        added.add_argument("paths", nargs="+", metavar="PATH", help="a folder, a tar or a brace pattern; s3://, too")

    add_audits(task)

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
    return made


def _index(paths: list[str], hashed: bool, merge: bool, **options) -> None:
    distributor, part = taken_from(options), part_from(options)
    found = local_shards(paths)
    from memtrain.data.index import index_beside, write_indexes

    mine = [found[place] for place in part.of(len(found))]
    if merge:
        lacking = [shard.name for shard in found if index_beside(shard, hashed) is None]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of {len(found)} shards have no index yet, such as {lacking[0]}; do the other parts "
                "first, or leave merge out to write them here"
            )
    done = list(progress_bar("Indexing shards")(write_indexes(mine, hashed, distributor), len(mine)))
    counts = [one.result for one in done if one.result is not None]
    samples, skipped = (sum(count[column] for count in counts) for column in (0, 1))
    there = sum(not count[2] for count in counts)
    print(
        f"indexed {samples} samples in {len(counts)} shards, {skipped} skipped"
        + (f"; {there} were indexed already" if there else "")
    )
    _end_with_those_left([(mine[one.index].name, one.failure) for one in done if one.failure])


def _end_with_those_left(left: list[tuple[str, str]]) -> None:
    """Name the shards that were left after some tries, and exit with 1 where there are any."""
    if left:
        print(f"left {len(left)} shards, the same command tries them again:")
        print_some([f"{shown(name)}: {shown(why)}" for name, why in left], "the log names all")
        sys.exit(1)


def _pack(source: Path, out: Path, **options) -> None:
    distributor, part = taken_from(options), part_from(options)
    check_empty(out)
    check_pictures(source)
    from memtrain.data.pack import pack

    options |= {"distributor": distributor, "part": part}
    report = pack(source, out, **options, progress=progress_bar("Packing"))
    where = shown(str(out)) if part.count == 1 else f"part {part}; `merge` makes {shown(str(out))} of all parts"
    print(f"wrote {report.samples} samples in {report.shards} shards: {where}")
    if report.ignored:
        print(f"left {report.ignored} files alone that are neither a picture nor the caption of one")
    if report.failures:
        print(f"left {len(report.failures)} pictures out:")
        lines = [f"{shown(name)}: {shown(why)}" for name, why in report.failures]
        print_some(lines, "the parquet beside each shard lists all")


def _draw(paths: list[str], out: Path, count: int, **options) -> None:
    check_empty(out)
    from memtrain.data.draw import draw
    from memtrain.data.samples import ShardSamples

    passed = draw(ShardSamples(paths, _DRAWN_SIDE), out, count, **options, progress=progress_bar("Drawing"))
    print(
        f"wrote {count} samples: {shown(str(out))}" + (f"; passed over {passed} that cannot be read" if passed else "")
    )
