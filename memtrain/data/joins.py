"""Joins over the partial results of a whole corpus, by DuckDB: what does not fit into memory waits on disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.data.partials import Manifest, full_disk_named
from memtrain.data.sources import LocalShard

_LIMIT = 0.6  # of the memory, for DuckDB's buffers: hash tables that begin to spill, and its files, are not all in it
_BATCH = 10_000  # rows


@contextlib.contextmanager
def joins(folder: Path, memory: int, threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in this folder that takes at most this much memory; it is gone afterwards.

    Raises:
        OSError: the disk is full.
        ValueError: the memory is too little.
    """
    home = folder / "joins"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{int(memory * _LIMIT)}B",
        "threads": str(threads),
        "temp_directory": str(home / "spilled"),
        "preserve_insertion_order": "false",
    }
    try:
        with full_disk_named(home):
            connection = duckdb.connect(str(home / "joins.duckdb"), config=config)
            try:
                yield connection
            except duckdb.OutOfMemoryException as error:
                if "max_temp_directory_size" in str(error):  # the disk is
                    raise
                raise ValueError(
                    f"{memory / 1e9:.1f} GB are too little to join the partial results ({str(error).splitlines()[0]}); "
                    "raise memory"
                ) from error
            finally:
                with contextlib.suppress(duckdb.Error):
                    connection.close()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def text(value: str | Path) -> str:
    """A value as SQL spells it."""
    return "'" + str(value).replace("'", "''") + "'"


def name_partials(connection: duckdb.DuckDBPyConnection, manifest: Manifest, shards: Sequence[LocalShard]) -> None:
    """Make the view `partials`: the rows of these shards, each with its shard's number and its `position`."""
    numbers = {shard: number for number, shard in enumerate(manifest.shards)}
    files = [str(manifest.partial(shard)) for shard in shards]
    table = manifest.folder / ".files.parquet"
    try:
        pq.write_table(pa.table({"filename": files, "shard": [numbers[shard] for shard in shards]}), table)
        connection.execute(f"create or replace table files as from read_parquet({text(table)})")
    finally:
        table.unlink(missing_ok=True)
    listed = ", ".join(map(text, files))
    connection.execute(
        f"""create or replace view partials as
        select f.shard, f.shard * 4294967296 + p.file_row_number as position, p.* exclude (filename, file_row_number)
        from read_parquet([{listed}], filename = true, file_row_number = true) p join files f using (filename)"""
    )


# Of a sha256, its first 128 bits, and of a key 128 bits: numbers, of which those of a whole corpus are grouped in
# bounded memory, where bytes of any length are not
DIGEST, NAME = "sha256[1:16]::bit::uhugeint", "md5_number(key)"


def copied(connection: duckdb.DuckDBPyConnection, query: str, file: Path) -> pq.ParquetFile:
    """The rows of a query, as a Parquet file."""
    connection.execute(f"copy ({query}) to {text(file)} (format parquet, compression zstd, row_group_size 100000)")
    return opened(file)


def opened(file: Path) -> pq.ParquetFile:
    """A Parquet file to go through: as pyarrow opens it by itself, all that was read would stay in memory."""
    return pq.ParquetFile(file, pre_buffer=False)


def rows_of(file: pq.ParquetFile) -> Iterator[dict]:
    """Row by row, some of them in memory at a time."""
    for batch in file.iter_batches(_BATCH):
        yield from batch.to_pylist()


def join_components(connection: duckdb.DuckDBPyConnection, edges: str) -> None:
    """Make the table `labels` of columns u, v: the least member v of the component of each u that is in an edge.

    Large stars and small stars in turn, until nothing changes: in about log² of the rounds of a walk, each a few
    joins over what is left of the edges (Kiveris et al., Connected Components in MapReduce and Beyond, SoCC 2014).

    Args:
        edges: a query with the columns a, b, numbers.
    """
    run = connection.execute
    run(
        f"create or replace table labels as select distinct greatest(a, b) u, least(a, b) v from ({edges}) where a <> b"
    )
    while True:
        # each node's larger neighbours are bound to the least of its neighbours and itself
        run("create or replace table both_ways as from labels union all select v, u from labels")
        run("create or replace table least_of as select u, least(u, min(v)) m from both_ways group by u")
        run(
            """create or replace table large as select distinct b.v u, l.m v from both_ways b join least_of l using (u)
            where b.v > b.u"""
        )
        # each node and its lesser neighbours are bound to the least of these
        run("create or replace table least_of as select u, min(v) m from large group by u")
        run(
            """create or replace table small as
            select b.v u, l.m v from large b join least_of l using (u) where b.v <> l.m
            union select u, m from least_of"""
        )
        (changed,) = run(
            "select exists(from small except from labels) or exists(from labels except from small)"
        ).fetchone() or (False,)
        run("create or replace table labels as from small")
        if not changed:
            run("drop table both_ways; drop table least_of; drop table large; drop table small")
            return
