"""`memtrain shards check | duplicates | report`: looks at many shards, in bounded memory."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from memtrain.cli.checks import check_new_file
from memtrain.cli.distributors import add_distributor, add_parts, cores, distributor_of, part_from
from memtrain.cli.listing import LISTED, print_some, progress_bar, shown
from memtrain.data.sources import local_shards

log = logging.getLogger("memtrain.shards")

_TABLE_ROWS = 50
_GB = 10**9
_LEAST = _GB // 2  # of memory=
BASE = 400_000_000  # bytes that a process takes with all that is imported to decode pictures
_WORKER = 450_000_000  # bytes that one takes while it decodes them
_SEARCHER = 150_000_000  # bytes that one takes that looks for near duplicates, besides its arrays
_AVX512 = "AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"

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


def add_audits(task: Callable[[Callable, str, str], argparse.ArgumentParser]) -> None:
    """Add the commands to a parser; `task` adds one."""

    def common(added: argparse.ArgumentParser, default: str) -> None:
        added.add_argument("paths", nargs="+", metavar="PATH", help="a folder, a tar or a brace pattern; s3://, too")
        add_distributor(added, cores())
        add_parts(added)
        with_memory(added)
        added.add_argument(
            "--manifest", type=Path, metavar="DIR", help=f"where partial results are, a file a shard ({default})"
        )

    def with_memory(added: argparse.ArgumentParser) -> None:
        added.add_argument("--memory", default="2GB", help="that all processes together take (%(default)s)")

    added = task(_check, "check", "say what training would lose, by name; exit with 1 if anything")
    common(added, "in the cache folder")
    added.add_argument("--json", action="store_true", dest="as_json", help="print everything found, as json")
    added.add_argument("--no-decode", action="store_false", dest="decode", help="trust the images: faster")

    added = task(_duplicates, "duplicates", "find exact and near duplicates (PDQ)")
    common(added, "beside OUT")
    added.add_argument("--out", type=Path, required=True, help="a new .parquet, a row a sample")
    added.add_argument("--distance", type=int, default=31, help="of 256 bits, for near ones (%(default)s)")

    added = task(_report, "report", "say how far a check or a search for duplicates is, and what it has found")
    added.add_argument("manifest", type=Path, metavar="MANIFEST", help="of check or duplicates")
    with_memory(added)


def memory_of(said: str) -> int:
    """`2GB`, `800MB` or a number, in bytes. Raises ValueError where it is none, or too little."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(B|kB|MB|GB|TB|KiB|MiB|GiB|TiB)?", said)
    if found is None:
        raise ValueError(f"memory={said} is no size; say memory=2GB")
    powers = {"k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
    unit = found[2] or "B"
    size = int(float(found[1]) * (1024 if "i" in unit else 1000) ** powers.get(unit[0], 0))
    if size < _LEAST:
        raise ValueError(f"memory={said} is too little; say memory=500MB or more")
    return size


def _workers(distributor: str, asked: int | None, memory: int) -> int | None:
    """How many processes there is memory for, of those that are asked for. None: as many as a cluster has room for."""
    if distributor != "local":
        return asked
    wanted = cores() if asked is None else asked
    room = max(1, (memory - BASE) // _WORKER)
    if wanted > room:
        log.info("memory=%.1fGB has room for %d of %d workers; raise it for more", memory / _GB, room, wanted)
        return room
    return wanted


def _check(paths: list[str], decode: bool, as_json: bool, **options) -> None:
    found = local_shards(paths)
    from memtrain.data.check import DECODED, TRUSTED, check_shards
    from memtrain.data.indexed import cache_folder
    from memtrain.data.partials import merging, open_manifest

    named = hashlib.sha256("\n".join(os.fsdecode(shard.path) for shard in found).encode(errors="surrogateescape"))
    option = DECODED if decode else TRUSTED
    folder = options["manifest"] or cache_folder(None) / "check" / f"{named.hexdigest()[:16]}-{option}"
    manifest, audit = open_manifest(folder, "check", option, found), _Audit(options)
    if not audit.make("Checking shards", manifest, check_shards):
        return
    from memtrain.data.check_report import report_check

    with merging(manifest):
        report = report_check(manifest, manifest.folder, audit.joining, audit.threads)
    if as_json:
        _print_json(report)
    else:
        _print_check(report)
    if report.loses:
        sys.exit(1)


def _duplicates(paths: list[str], out: Path, distance: int, **options) -> None:
    check_new_file("--out", out)
    found = local_shards(paths)
    sort_fast()
    from memtrain.data.duplicates import check_distance, hash_shards
    from memtrain.data.partials import open_manifest

    check_distance(distance)
    folder = options["manifest"] or out.with_name(f"{out.stem}.partials")
    audit = _Audit(options)
    manifest = open_manifest(folder, "duplicates", "", found)
    if not audit.make("Hashing images", manifest, hash_shards):
        return
    from memtrain.data.duplicate_groups import group_duplicates

    groups = group_duplicates(
        manifest, out, distance, audit.joining, audit.threads, audit.searchers(), audit.searching,
        progress_bar("Searching near duplicates"),
    )  # fmt: skip
    print(f"{groups.num_groups} groups with {groups.grouped} of {groups.num_samples} samples: {shown(str(out))}")
    lines = [f"{size} {kind}  {shown(caption, 100)}" for size, kind, caption in groups.first_groups(LISTED)]
    print_some(lines, "the parquet lists all", groups.num_groups)
    if groups.unreadable:
        print(f"{groups.unreadable} that could not be hashed:")
        lines = [f"{shown(name)}: {shown(why)}" for name, why in groups.some_unreadable]
        print_some(lines, "memtrain shards check --json lists all", groups.unreadable)
    log.info("partial results stay in %s: a next search takes what has not changed from there", folder)


class _Audit:
    """Who does a command's tasks, which of them, and in how much memory: taken from its options."""

    def __init__(self, options: dict):
        self.memory = memory_of(options["memory"])
        self.part, self.merge = part_from(options), options["merge"]
        self.name, self.asked = options["distributor"], options["workers"]
        self.address = options["ray_address"]
        workers = _workers(self.name, self.asked, self.memory)
        self.distributor = distributor_of(self.name, workers, self.address, 1)
        # while one process joins, it has all the memory but what the interpreter and libraries take
        self.joining = self.memory - BASE
        self.threads = max(1, min(cores(), self.memory // _GB))
        # a searcher decodes nothing; the process that started it waits
        self.num_searchers = max(1, min(cores() if self.asked is None else self.asked, self.memory // _GB))
        self.searching = max(_LEAST // 4, (self.memory - BASE) // self.num_searchers - _SEARCHER)

    def searchers(self):
        if self.name == "local":
            return distributor_of(self.name, self.num_searchers, self.address, 1)
        return self.distributor

    def make(self, description: str, manifest, work: Callable) -> bool:
        """Make this part's partial results, or with `merge` none; whether all are there, to be joined.

        Exits with 1 where shards were left.
        """
        from memtrain.data.partials import all_done

        if self.merge:
            lacking = len(manifest.shards) - len(all_done(manifest))
            if lacking:
                raise ValueError(
                    f"{lacking} of {len(manifest.shards)} shards are not done yet, or have changed since, by "
                    f"{manifest.folder}; do the other parts first, or leave merge out to do them here"
                )
            return True
        mine = [manifest.shards[place] for place in self.part.of(len(manifest.shards))]
        done = list(progress_bar(description)(work(manifest, self.part, self.distributor), len(mine)))
        kept = sum(one.result["kept"] for one in done if one.result)
        if kept:
            log.info("%d of %d shards were done before and have not changed: %s", kept, len(mine), manifest.folder)
        left = [(mine[one.index].name, one.failure) for one in done if one.failure]
        if left:
            print(f"left {len(left)} shards, the same command tries them again:")
            print_some([f"{shown(name)}: {shown(why)}" for name, why in left], "the log names all")
            sys.exit(1)
        if self.part.count > 1:
            samples = sum(one.result["samples"] for one in done if one.result)
            print(f"part {self.part}: {samples} samples in {len(mine)} shards; the same with merge joins all parts")
            return False
        return True


def _print_json(report) -> None:
    """The report as json, a fault at a time."""
    print(json.dumps(report.totals(), indent=2)[:-2] + ',\n  "faults": [', end="")
    separator = "\n"
    for fault in report.iter_faults():
        print(separator + textwrap.indent(json.dumps(asdict(fault), indent=2), "    "), end="")
        separator = ",\n"
    print("]\n}" if separator == "\n" else "\n  ]\n}")


def _print_check(report) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = report.totals()
    rows, total = found["shards"], found["total"]
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
    faults = sum(total["faults"].values())
    print(f"{report.lost} faults that lose something, {faults - report.lost} that do not")
    some = islice(report.iter_faults(), LISTED)
    said = [(("kept", "lost")[fault.lost], shown(fault.name), shown(fault.cause)) for fault in some]
    print_some([f"{fate}  {name}: {cause}" for fate, name, cause in said], "--json lists all", faults)


def _report(manifest: Path, memory: str) -> None:
    from memtrain.data.partials import read_manifest

    found = read_manifest(manifest)
    size = memory_of(memory)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=found.folder) as folder:
        if found.command == "check":
            from memtrain.data.check_report import report_check

            report = report_check(found, Path(folder), size - BASE, 1)
            print(f"{len(report.shards)} of {len(found.shards)} shards are checked")
            if report.shards:
                _print_check(report)
            return
        from memtrain.data.duplicate_groups import standing

        now = standing(found, Path(folder), size - BASE, 1)
    print(f"{now.shards} of {now.of_shards} shards are hashed: {now.samples} samples, {now.unreadable} unreadable")
    print(f"{now.exact_groups} groups of exact duplicates with {now.exact_samples} samples among these")
    if now.searches:
        print(f"{now.searched} of {now.searches} parts of the search for near ones are done: {now.near_pairs} pairs")


def sort_fast() -> None:
    """Have numpy, where it is not imported yet, sort by AVX2 on AMD's processors: AVX-512 is 5 times slower there."""
    with contextlib.suppress(OSError):
        said = Path("/proc/cpuinfo").read_text()
        if "AuthenticAMD" in said and "avx512f" in said:
            os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", _AVX512)
