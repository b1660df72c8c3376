"""The ledger: what happened to every scored sample at every step, as Parquet parts that each rank writes.

`ledger/rank0-000001.parquet`: step, key, duplicate_of, group, timestep, score, loss, threshold, kept; and with
score=both the second score, by its name. A part appears under its name when it is whole. Parts are closed when a
checkpoint is made, so that what precedes it is on disk; rows at or past the step that a run begins at are of one that
was broken off later, and are removed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from memtrain.core.exclusion import GROUP_NAMES
from memtrain.core.files import written_aside
from memtrain.core.scores import MAGNITUDE, SCORES
from memtrain.core.streams import Stream, place_seeds
from memtrain.data.escaping import as_text
from memtrain.data.paths import check_ledger, ledger_parts

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # optimizer step, from 0
        ("key", pa.string()),  # sample key: shard path and __key__
        ("duplicate_of", pa.string()),  # key of the first sample of the same picture; null where that is this one
        ("group", pa.string()),  # train, canary, sacrificed or reference
        ("timestep", pa.int16()),  # of this visit
        ("score", pa.float32()),  # that the rule goes by, see `About`; null where it was not taken at this visit
        ("loss", pa.float32()),
        ("threshold", pa.float32()),  # what the sample was held against, in the rule's own unit
        ("kept", pa.bool_()),  # trained on (reference: would have been)
    ]
)
_ABOUT = b"memtrain"  # key of the schema's metadata
_PART_ROWS = 500_000  # a part is closed at so many, checkpoint or not


@dataclass(frozen=True)
class About:
    """What is true of a whole ledger, kept in each part."""

    num_timesteps: int  # of the schedule
    sample: float  # share of the rows that was written
    score: str = MAGNITUDE  # which one the column is
    second: str | None = None  # the one that was taken beside it, and the column that it is in; None: there is none

    @property
    def schema(self) -> pa.Schema:
        """The columns, and this."""
        schema = SCHEMA if self.second is None else SCHEMA.append(pa.field(self.second, pa.float32()))
        return schema.with_metadata({_ABOUT: json.dumps(self.__dict__).encode()})

    def column(self, score: str) -> str:
        """The column of one of the scores. Raises ValueError where it was not taken."""
        columns = {self.score: "score"} | ({} if self.second is None else {self.second: self.second})
        if score not in columns:
            raise ValueError(f"the ledger has no {score} score, only {', '.join(columns)}; train with score=both")
        return columns[score]


@dataclass(frozen=True)
class LedgerRows:
    """Rows of the ledger: N visits of samples."""

    step: np.ndarray  # (N,) int64
    sample_index: np.ndarray  # (N,) int64, position in the corpus
    picture: np.ndarray  # (N,) int64, position of the first sample of the same picture
    group: np.ndarray  # (N,) int8
    timestep: np.ndarray  # (N,) int16
    score: np.ndarray  # (N,) float32
    scored: np.ndarray  # (N,) bool, the score was taken at this visit
    loss: np.ndarray  # (N,) float32
    threshold: np.ndarray  # (N,) float32
    kept: np.ndarray  # (N,) bool
    second_score: np.ndarray  # (N,) float32, taken beside the score; 0 where none was

    def __len__(self) -> int:
        return len(self.step)

    def where(self, mask: np.ndarray) -> LedgerRows:
        return LedgerRows(*(getattr(self, field.name)[mask] for field in fields(LedgerRows)))

    @staticmethod
    def concatenate(parts: Sequence[LedgerRows]) -> LedgerRows:
        names = [field.name for field in fields(LedgerRows)]
        return LedgerRows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def drawn(seed: int, step: np.ndarray, sample_index: np.ndarray, share: float) -> np.ndarray:
    """Which rows a ledger of a share of them holds: a function of (seed, step, sample). (N,) bool"""
    return place_seeds(seed, Stream.LEDGER, step, sample_index) * 2.0**-63 < share


class LedgerWriter:
    """Writes the parts of one rank.

    Args:
        folder: the ledger's, there already.
        rank: of this process.
        key: position in the corpus -> sample key.
        about: kept in each part.
    """

    def __init__(self, folder: Path, rank: int, key: Callable[[int], str], about: About):
        self.folder, self.rank, self.key, self.about = folder, rank, key, about
        self.number = max((number for number, of, _ in ledger_parts(folder) if of == rank), default=0)
        self.buffer: list[LedgerRows] = []

    def add(self, rows: LedgerRows) -> None:
        self.buffer.append(rows)
        if sum(map(len, self.buffer)) >= _PART_ROWS:
            self.close_part()

    def close_part(self) -> None:
        """Put what was added since the last part on disk."""
        if not self.buffer:
            return
        rows, self.buffer = LedgerRows.concatenate(self.buffer), []
        if len(rows):
            self.number += 1
            _write(self._table(rows), self.folder / f"rank{self.rank}-{self.number:06d}.parquet")

    def _table(self, rows: LedgerRows) -> pa.Table:
        columns = [
            rows.step,
            self._keys(rows.sample_index),
            self._keys(np.where(rows.picture == rows.sample_index, -1, rows.picture)),
            pa.array(GROUP_NAMES).take(pa.array(rows.group)),
            rows.timestep,
            pa.array(rows.score, mask=~rows.scored),
            rows.loss,
            rows.threshold,
            rows.kept,
        ]
        if self.about.second is not None:
            columns.append(pa.array(rows.second_score, mask=rows.second_score == 0))
        return pa.table(columns, schema=self.about.schema)

    def _keys(self, positions: np.ndarray) -> pa.Array:
        """Sample keys of positions; null of -1. (n,)"""
        samples, which = np.unique(positions, return_inverse=True)  # sorted: shard after shard
        keys = [None if index < 0 else as_text(self.key(index)) for index in samples.tolist()]
        return pa.array(keys, pa.string()).take(pa.array(which))


def _write(table: pa.Table, path: Path) -> None:
    """Write a part as small as it gets: floats by bytes of equal weight, keys as they are, the rest as dictionaries."""
    names = table.schema.names
    with written_aside(path) as aside, aside.open("wb") as file:
        pq.write_table(
            table,
            file,
            compression="zstd",
            compression_level=9,
            use_dictionary=["step", "duplicate_of", "group", "timestep", "threshold"],
            column_encoding={name: "BYTE_STREAM_SPLIT" for name in ("score", "loss", *SCORES) if name in names},
        )
        file.flush()
        os.fsync(file.fileno())  # before the checkpoint that counts on it, which is synced itself


def begin(folder: Path, step: int, earlier: Sequence[Path]) -> None:
    """Make the ledger hold what happened before `step` alone. One process does this for all ranks.

    Args:
        folder: the ledger's.
        step: that the run begins at.
        earlier: where that of the run that made the checkpoint may lie; the first that is there is taken.
    """
    source = next((path for path in earlier if ledger_parts(path)), folder)
    folder.mkdir(parents=True, exist_ok=True)
    for aside in folder.glob(".rank*.parquet"):
        aside.unlink()
    if source.resolve() != folder.resolve():
        for _, _, path in ledger_parts(folder):  # of another past
            path.unlink()
        for _, _, path in ledger_parts(source):
            _link(path, folder / path.name)
    removed = sum(_cut(path, step) for _, _, path in ledger_parts(folder))
    if removed:
        log.info("ledger: removed %d rows at or past step %d, where this run begins", removed, step)
    if step and not ledger_parts(folder):
        log.warning("the ledger begins at step %d: that of the run that made the checkpoint is not there", step)


def _link(path: Path, to: Path) -> None:
    """Have a part under another name, too; copied where it cannot be linked."""
    try:
        os.link(path, to)  # parts are replaced, never changed
    except OSError:  # another file system
        with written_aside(to) as aside:
            shutil.copyfile(path, aside)


def _cut(path: Path, step: int) -> int:
    """Remove a part's rows at or past `step`; returns how many."""
    if pc.max(pq.read_table(path, columns=["step"])["step"]).as_py() < step:
        return 0
    table = pq.read_table(path)
    before = table.filter(pc.field("step") < step)
    if len(before):
        _write(before, path)
    else:
        path.unlink()
    return len(table) - len(before)


def read_ledger(run: str | Path) -> pyarrow.dataset.Dataset:
    """The ledger of a run: a row for each sample of each step that was scored or decided on, see `SCHEMA`.

    `.to_table()` reads it into memory, `.to_batches()` piece by piece; DuckDB and Polars take it as it is.
    Of a run that goes on it holds what its checkpoints hold.

    Raises:
        ValueError: the run has none.
    """
    parts = [str(path) for path in check_ledger(run)]
    return pyarrow.dataset.dataset(parts, format="parquet", schema=pq.read_schema(parts[0]))


def batches(
    ledger: pyarrow.dataset.Dataset, columns: list[str] | dict[str, pc.Expression], rows: pc.Expression | None = None
) -> Iterator[pa.RecordBatch]:
    """Columns of a ledger, piece by piece and in order; few pieces are in memory at a time."""
    scanned = ledger.to_batches(columns, rows, batch_size=2**16, batch_readahead=1, fragment_readahead=1)
    return (batch for batch in scanned if len(batch))


class KeyNumbers:
    """Numbers samples as their keys come, piece by piece: 4 bytes a row instead of a key."""

    def __init__(self) -> None:
        self.keys = pa.array([], pa.string())  # of each number

    def of(self, keys: pa.Array) -> np.ndarray:
        """The number of each key, new ones for keys that were not seen before. (N,) -> (N,) int32"""
        encoded = keys.dictionary_encode()
        known = pc.index_in(encoded.dictionary, self.keys)
        fresh = encoded.dictionary.filter(known.is_null())
        number = known.fill_null(-1).to_numpy().copy()
        number[number < 0] = np.arange(len(self.keys), len(self.keys) + len(fresh))
        self.keys = pa.concat_arrays([self.keys, fresh])
        return number[encoded.indices.to_numpy()]


def read_about(run: str | Path) -> About:
    """What is true of all rows of a run's ledger. Raises ValueError where there is none."""
    return About(**json.loads(read_ledger(run).schema.metadata[_ABOUT]))
