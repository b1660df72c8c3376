"""The groups of duplicates among all shards, or among those that are done, joined from their partial results.

Pairs of equal hashes are found by joins (`data.joins`), pairs of near ones by passes over the distinct hashes
(`data.near_pairs`); components of the pairs are the groups. What was made of one state of the partials stays in a
folder beside them until the table is there, so that a stop loses little.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.core.files import written_aside
from memtrain.data.covering import MIRRORED, WORDS
from memtrain.data.distribute import Distributor
from memtrain.data.duplicates import COLUMNS, Duplicates
from memtrain.data.hashes import MIN_QUALITY
from memtrain.data.joins import DIGEST, copied, join_components, joins, name_partials, text
from memtrain.data.near_search import DISTINCT, NEAR, Progress, search, searches
from memtrain.data.partials import Manifest, all_done, full_disk_named, merging
from memtrain.data.sources import LocalShard

_BATCH = 10_000  # rows
_NAMED = 100  # of what could not be hashed
_WORDS = tuple(f"w{n}" for n in range(WORDS))
_HASHES = pa.schema([("position", pa.int64()), *((word, pa.uint64()) for word in _WORDS)])
# In a work folder: pairs of positions, and the positions of the distinct hashes, which themselves come last
_EXACT, _EQUAL, _POSITIONS = "exact.parquet", "equal.parquet", "distinct.parquet"


def group_duplicates(
    manifest: Manifest,
    out: Path,
    distance: int,
    memory: int,
    threads: int,
    searchers: Distributor,
    searcher_memory: int,
    progress: Progress,
) -> Duplicates:
    """Group the samples of the shards that are done, and write the table.

    Args:
        distance: of 256 bits, how many near duplicates may differ in.
        memory, threads: bytes that the joins may take, and how many threads they are done by.
        searchers: do the passes over the distinct hashes, each in `searcher_memory` bytes.

    Raises:
        ValueError: another process does the same.
        OSError: the disk is full.
    """
    with merging(manifest):
        work = find_equal(manifest, distance, memory, threads)
        search(work, distance, searcher_memory, searchers, progress)
        return write_groups(manifest, work, out, memory, threads)


@dataclass(frozen=True)
class Standing:
    """How far a search for duplicates is: `exact` groups are among the shards that are done. `searched` tasks of
    `searches` for near ones are over; both are 0 until all shards are hashed and compared."""

    shards: int
    of_shards: int
    samples: int
    unreadable: int
    exact_groups: int
    exact_samples: int
    searched: int
    searches: int
    near_pairs: int


def standing(manifest: Manifest, folder: Path, memory: int, threads: int) -> Standing:
    """What the partial results say by now.

    Args:
        folder: for what does not fit into memory.
        memory: bytes that the joins may take.
    """
    there = all_done(manifest)
    groups, grouped = 0, 0
    if there:
        with joins(folder, memory, threads) as connection:
            name_partials(connection, manifest, [shard for shard, _ in there])
            query = f"select count(*) n from partials where sha256 is not null group by {DIGEST} having count(*) > 1"
            groups, grouped = connection.execute(f"select count(*), coalesce(sum(n), 0) from ({query})").fetchone() or (
                0,
                0,
            )
    searched, total, pairs = 0, 0, 0
    for work in manifest.folder.glob(f"merge-{manifest.identity()}-*"):
        if (work / DISTINCT).exists():
            total = len(searches(work, int(work.name.rsplit("-", 1)[1])))
            found = list((work / NEAR).glob("*.parquet"))
            searched, pairs = len(found), sum(pq.read_metadata(file).num_rows for file in found)
    samples, bad = (sum(counts[name] for _, counts in there) for name in ("samples", "unreadable"))
    return Standing(len(there), len(manifest.shards), samples, bad, groups, int(grouped), searched, total, pairs)


def _work_folder(manifest: Manifest, distance: int) -> Path:
    """Where what belongs to this state of all shards lies; what belongs to another one is removed."""
    work = manifest.folder / f"merge-{manifest.identity()}-{distance}"
    for other in manifest.folder.glob("merge-*"):
        if other != work:
            shutil.rmtree(other)
    (work / NEAR).mkdir(parents=True, exist_ok=True)
    return work


def find_equal(manifest: Manifest, distance: int, memory: int, threads: int) -> Path:
    """Write pairs of equal sha256, pairs of equal perceptual hashes, and the distinct ones of these.

    Returns the work folder, in which they are; where they were written before, this is all.
    """
    shards = [shard for shard, _ in all_done(manifest)]
    work = _work_folder(manifest, distance)
    if not (work / DISTINCT).exists():
        with joins(work, memory, threads) as connection:
            name_partials(connection, manifest, shards)
            _find_equal(connection, manifest, shards, work)
    return work


def _find_equal(
    connection: duckdb.DuckDBPyConnection, manifest: Manifest, shards: Sequence[LocalShard], work: Path
) -> None:
    hashes = work / "hashes.parquet"
    with full_disk_named(hashes), pq.ParquetWriter(hashes, _HASHES) as writer:
        done = set(shards)
        for number, shard in enumerate(manifest.shards):
            if shard in done:
                writer.write_table(_comparable(manifest.partial(shard), number))
    words, run = ", ".join(_WORDS), connection.execute
    run(f"create view images as select position, {DIGEST} digest from partials where sha256 is not null")
    run("create table twice as select digest, min(position) f from images group by digest having count(*) > 1")
    query = "select i.position a, t.f b from images i join twice t using (digest) where i.position <> t.f"
    copied(connection, query, work / _EXACT)
    run(
        f"""create table distinct_hashes as select min(position) f, count(*) n, {words}
        from read_parquet({text(hashes)}) group by {words}"""
    )
    query = f"""select h.position a, d.f b from read_parquet({text(hashes)}) h join distinct_hashes d using ({words})
        where d.n > 1 and h.position <> d.f"""
    copied(connection, query, work / _EQUAL)
    found = copied(connection, f"select f as position, {words} from distinct_hashes", work / _POSITIONS)
    hashes.unlink()
    with written_aside(work / DISTINCT) as aside, aside.open("wb") as file:
        for batch in found.iter_batches(_BATCH, columns=list(_WORDS)):
            np.stack([batch[word].to_numpy() for word in _WORDS], axis=1).tofile(file)


def _comparable(file: Path, number: int) -> pa.Table:
    """Positions and perceptual hashes of the samples of a shard's partial that have features to compare.

    Of a hash and that of the mirror image, which differ in the lowest bit of all, the one without that bit stands for
    both.
    """
    table = pq.read_table(file, columns=["pdq", "quality"])
    quality = table["quality"].fill_null(-1).to_numpy()
    rows = np.flatnonzero(quality >= MIN_QUALITY)
    pdq = b"".join(table["pdq"].take(pa.array(rows)).to_pylist())
    words = np.frombuffer(pdq, np.uint64).reshape(-1, WORDS)
    words = np.where(words[:, :1] & np.uint64(1), words ^ MIRRORED, words)
    columns = [words[:, word].copy() for word in range(WORDS)]
    return pa.table([(number << 32) + rows, *columns], schema=_HASHES)


def write_groups(manifest: Manifest, work: Path, out: Path, memory: int, threads: int) -> Duplicates:
    """Join all pairs to groups, and write the table; the work folder is removed."""
    there = all_done(manifest)
    with joins(work, memory, threads) as connection:
        name_partials(connection, manifest, [shard for shard, _ in there])
        num_groups, grouped = _write_groups(connection, manifest, work, out)
        unreadable = _unreadable(connection, manifest, _NAMED)
    shutil.rmtree(work)
    samples, bad = (sum(counts[name] for _, counts in there) for name in ("samples", "unreadable"))
    return Duplicates(out, samples, num_groups, grouped, bad, unreadable)


def _write_groups(connection: duckdb.DuckDBPyConnection, manifest: Manifest, work: Path, out: Path) -> tuple[int, int]:
    edges = [f"select a, b from read_parquet({text(work / name)})" for name in (_EXACT, _EQUAL)]
    if any((work / NEAR).iterdir()):
        connection.execute(
            f"""create view places as select file_row_number as row, position
            from read_parquet({text(work / _POSITIONS)}, file_row_number = true)"""
        )
        edges.append(
            f"""select one.position a, other.position b from read_parquet({text(work / NEAR / "*.parquet")}) n
            join places one on one.row = n.a join places other on other.row = n.b"""
        )
    join_components(connection, " union all ".join(edges))
    run = connection.execute
    # the largest group first, of equally large ones the one that comes first, each in the order of the corpus
    run(
        """create table members as select u as position, v as label from labels
        union all select distinct v, v from labels"""
    )
    run(
        """create table numbered as select label, row_number() over (order by count(*) desc, label) - 1 as number
        from members group by label"""
    )
    run(
        """create table grouped as select n.number, p.position, p.shard, p.key, p.sha256, p.pdq, p.quality, p.caption
        from partials p join members m using (position) join numbered n using (label)"""
    )
    run(
        f"""create table kinds as select number, if(min({DIGEST}) = max({DIGEST}), 'exact', 'near') as kind
        from grouped group by number"""
    )
    query = """select number as "group", kind, shard, key, lower(hex(sha256)) as sha256, lower(hex(pdq)) as pdq,
        quality, caption from grouped join kinds using (number) order by number, position"""
    found = copied(connection, query, work / "groups.parquet")
    counted = found.metadata.num_rows
    with (
        written_aside(out, shared=True) as aside,
        full_disk_named(out),
        pq.ParquetWriter(aside, COLUMNS, compression="zstd") as writer,
    ):
        for batch in found.iter_batches(_BATCH):
            shards, keys = batch["shard"].to_pylist(), batch["key"].to_pylist()
            names = [_name(manifest, shard, key) for shard, key in zip(shards, keys, strict=True)]
            table = pa.Table.from_batches([batch]).drop_columns(["shard", "key"]).append_column("key", [names])
            writer.write_table(table.select(COLUMNS.names).cast(COLUMNS))
    (groups,) = run("select count(*) from numbered").fetchone() or (0,)
    return groups, counted


def _name(manifest: Manifest, shard: int, key: bytes) -> str:
    """A sample's key as a table can hold it: what is not UTF-8 becomes U+FFFD."""
    name = manifest.shards[shard].name
    return f"{name}/{key.decode('utf-8', 'replace')}" if key else name


def _unreadable(connection: duckdb.DuckDBPyConnection, manifest: Manifest, count: int) -> list[tuple[str, str]]:
    """The first of those that could not be hashed: (sample key, why)."""
    query = f"select shard, key, problem from partials where problem is not null order by position limit {count}"
    rows = connection.execute(query).fetchall()
    return [(_name(manifest, shard, key), problem) for shard, key, problem in rows]
