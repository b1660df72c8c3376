"""What `check` has found in all shards, or in those that are done: joined from their partial results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.core.files import written_aside
from memtrain.data.check import DECODED, KINDS, Fault, decoded, encoded
from memtrain.data.joins import DIGEST, NAME, copied, joins, name_partials, opened, rows_of
from memtrain.data.partials import Manifest, all_done, full_disk_named

FAULTS = "faults.parquet"
_REPEATS = ".repeats.parquet"
_FAULTS = pa.schema(
    [("shard", pa.string()), ("key", pa.binary()), ("kind", pa.string()), ("cause", pa.binary()), ("lost", pa.bool_())]
)
_BATCH = 10_000  # faults


@dataclass(frozen=True)
class ShardCounts:
    """Of `samples` keys in a shard, `complete` have an image that can be read and a caption; faults by their kind.

    `successes` is what _stats.json counts, None without one.
    """

    name: str
    samples: int
    complete: int
    successes: int | None
    faults: dict[str, int]


@dataclass(frozen=True)
class CorpusReport:
    """Counts of each shard; the faults themselves, which may be many, are in a file, in the order of the corpus.

    `missing`: of how many shards there is no partial result.
    """

    shards: list[ShardCounts]
    decoded: bool
    lost: int  # faults that lose something
    file: Path
    missing: int = 0

    @property
    def loses(self) -> bool:
        return self.lost > 0

    def iter_faults(self) -> Iterator[Fault]:
        """Of all shards, those that lose something first; some of them in memory at a time."""
        for lost in (True, False):
            for row in rows_of(opened(self.file)):
                if row["lost"] == lost:
                    yield Fault(row["shard"], decoded(row["key"]), row["kind"], decoded(row["cause"]), lost)

    @property
    def faults(self) -> list[Fault]:
        return list(self.iter_faults())

    def totals(self) -> dict[str, Any]:
        """All but the faults themselves, as plain values."""
        total = {
            "shards": len(self.shards),
            "samples": sum(shard.samples for shard in self.shards),
            "complete": sum(shard.complete for shard in self.shards),
            "faults": {kind: sum(shard.faults[kind] for shard in self.shards) for kind in KINDS},
        }
        shards = [asdict(shard) for shard in self.shards]
        return {"loses": self.loses, "decoded": self.decoded, "total": total, "shards": shards}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return self.totals() | {"faults": [asdict(fault) for fault in self.iter_faults()]}


def report_check(manifest: Manifest, folder: Path, memory: int, threads: int) -> CorpusReport:
    """Join the partial results of the shards that are done.

    Args:
        folder: where the faults are written, by one process at a time.
        memory: bytes that the joins may take.

    Raises:
        OSError: the disk is full.
    """
    there = all_done(manifest)
    repeats: Iterable[dict] = []
    if there:
        with joins(folder, memory, threads) as connection:
            name_partials(connection, manifest, [shard for shard, _ in there])
            repeats = _repeats(connection, folder)
    by_shard = groupby(repeats, itemgetter("shard"))
    upcoming = next(by_shard, None)
    shards, lost = [], 0
    target = folder / FAULTS
    numbers = {shard: number for number, shard in enumerate(manifest.shards)}
    with written_aside(target) as aside, full_disk_named(target), pq.ParquetWriter(aside, _FAULTS) as writer:
        for shard, counts in there:
            faults = {kind: counts[kind] for kind in KINDS}
            found = _own_faults(manifest.partial(shard))
            if upcoming is not None and upcoming[0] == numbers[shard]:
                found = chain(found, (_repeat(row, manifest) for row in upcoming[1]))
            for batch in _batches(found):
                for row in batch:
                    faults[row["kind"]] += row.pop("is_new", 0)
                writer.write_table(pa.Table.from_pylist([{"shard": shard.name} | row for row in batch], _FAULTS))
            if upcoming is not None and upcoming[0] == numbers[shard]:
                upcoming = next(by_shard, None)
            lost += counts["lost"]
            shards.append(ShardCounts(shard.name, counts["samples"], counts["complete"], counts["successes"], faults))
    (folder / _REPEATS).unlink(missing_ok=True)
    return CorpusReport(shards, manifest.option == DECODED, lost, target, len(manifest.shards) - len(there))


def _own_faults(file: Path) -> Iterator[dict]:
    """Faults of one shard by itself, in the order in which they were found."""
    for batch in opened(file).iter_batches(columns=["key", "kind", "cause", "lost"]):
        yield from batch.filter(batch["kind"].is_valid()).to_pylist()


def _batches(rows: Iterable[dict]) -> Iterator[list[dict]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _repeats(connection: duckdb.DuckDBPyConnection, folder: Path) -> Iterator[dict]:
    """Equal images and keys: rows that repeat an earlier one, by shard, and there in the order of a report.

    A row is compared with the first one of its shard that equals it, else with the first one of the corpus.
    """
    run = connection.execute
    run(f"create view samples as select *, {DIGEST} digest, {NAME} name from partials where sha256 is not null")
    run("create table twice as select digest, min(position) f from samples group by digest having count(*) > 1")
    run(
        """create table equal_images as select s.position, s.shard, s.key, t.f as first_of_all,
        min(s.position) over (partition by digest, s.shard) as first_here
        from samples s join twice t using (digest)"""
    )
    run("create table names_twice as select name, min(position) f from samples group by name having count(*) > 1")
    within = """select e.shard, 0 as kind, e.position, e.key, o.shard as other_shard, o.key as other_key, 0 as more
        from equal_images e join equal_images o on o.position = e.first_here where e.position <> e.first_here"""
    across = """select e.shard, 1, e.position, e.key, o.shard, o.key, 0
        from equal_images e join equal_images o on o.position = e.first_of_all
        where e.position = e.first_here and e.shard <> o.shard"""
    keys = """select shard, 2, min(position), arg_min(key, position), arg_min(f, position) // 4294967296, null,
        count(*) - 1 from samples join names_twice using (name) where f // 4294967296 <> shard group by shard"""
    query = f"{within} union all {across} union all {keys} order by 1, 2, 3"
    return rows_of(copied(connection, query, folder / _REPEATS))  # here: they are in a file of their own


def _repeat(row: dict, manifest: Manifest) -> dict:
    """A row of `_repeats` as a fault; `is_new`: its shard's own counts are without it."""
    other = manifest.shards[row["other_shard"]].name
    if row["kind"] == 0:
        kind, cause = "duplicate_within", f"same image as {decoded(row['other_key'])}"
    elif row["kind"] == 1:
        kind, cause = "duplicate_across", f"same image as {other}/{decoded(row['other_key'])}"
    else:
        more = f", as are {row['more']} more of the shard" if row["more"] else ""
        kind, cause = "key_across", f"key is in {other} too{more}; a sample is its shard and its key"
    return {"key": row["key"], "kind": kind, "cause": encoded(cause), "lost": False, "is_new": 1}
