"""Samples that a list leaves out of a corpus, `data.exclude_keys`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.progress import track

from memtrain.data.escaping import as_text
from memtrain.data.indexed import IndexedShards
from memtrain.data.kept import MANY, file_state, once, rows_of
from memtrain.data.names import as_names, by_shard, places
from memtrain.data.paths import KEYS, check_file
from memtrain.data.row_filter import FilteredRows

log = logging.getLogger(__name__)


def read_keys(path: str | Path) -> pa.Array:
    """The sample keys (shard path and `__key__`) in a list: a parquet's column `key`, or the lines of a .txt.

    Returns:
        Each once, as bytes, see `memtrain.data.names.as_names`.

    Raises:
        ValueError: the list cannot be read, or has no such column.
    """
    file = check_file("data.exclude_keys", path, KEYS)
    try:
        if file.suffix == ".txt":
            lines = file.read_text(encoding="utf-8").splitlines()
            return pc.unique(as_names([line.strip() for line in lines if line.strip()]))
        if "key" not in pq.read_schema(file).names:
            raise ValueError("it has no column key")
        keys = pq.read_table(file, columns=["key"])["key"]
        if pa.types.is_integer(keys.type):
            keys = keys.cast(pa.string())
        return pc.unique(keys.cast(pa.large_binary()).drop_null())
    except (OSError, ValueError) as error:  # pyarrow's are ValueErrors too
        raise ValueError(f"data.exclude_keys={path} cannot be read ({str(error).splitlines()[0]}); {KEYS}") from error


def check_list(path: str | Path) -> int:
    """About how many keys a list has, which is looked at before anything that takes long; a short one is read whole.

    Raises:
        ValueError: see `read_keys`.
    """
    count = rows_of(path)
    return len(read_keys(path)) if count < MANY else count


def excluded_rows(
    path: str | Path, indexed: IndexedShards, filtered: FilteredRows, where: str | None
) -> Mapping[int, np.ndarray]:
    """Shard -> rows of it whose samples are on the list, sorted. Rows keep their numbers, as caches need it.

    Of a long list they are found by one process of a machine, in files in the cache folder that all of them map.

    Args:
        path: of the list, see `read_keys`.
        where: the filter whose rows these are.

    Raises:
        ValueError: none of the keys is in the corpus.
    """

    def make() -> dict[str, np.ndarray]:
        return _find(read_keys(path), indexed, filtered)

    if rows_of(path) < MANY:
        found = make()
    else:
        found = once(indexed.cache_dir / "excluded", f"{file_state(path)}\n{where}\n{indexed.state}", make)
    listed, unknown = found["counts"].tolist()
    example = bytes(found["example"][0]).decode("utf-8", "replace")
    if unknown == listed:
        raise ValueError(
            f"data.exclude_keys={path}: none of its {listed} keys, such as {example}, is in "
            "data.shards; was the list made from another corpus?"
        )
    log.info("data.exclude_keys drops %d samples: %s", len(found["rows"]), path)
    if unknown:
        log.warning("data.exclude_keys: %d of its %d keys are not in data.shards, such as %s", unknown, listed, example)
    return _Slices(found["rows"], dict(zip(found["shards"].tolist(), found["bounds"].tolist(), strict=True)))


class _Slices(Mapping[int, np.ndarray]):
    """Shard -> its part of the rows of all, which lie one shard after the other."""

    def __init__(self, rows: np.ndarray, bounds: Mapping[int, tuple[int, int]]):
        self.rows, self.bounds = rows, bounds

    def __getitem__(self, number: int) -> np.ndarray:
        start, end = self.bounds[number]
        return self.rows[start:end]

    def __iter__(self) -> Iterator[int]:
        return iter(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds)


def _find(listed: pa.Array, indexed: IndexedShards, filtered: FilteredRows) -> dict[str, np.ndarray]:
    """The excluded rows of all shards, each shard's bounds, how many keys are listed and unknown, and one such."""
    numbers = {as_text(shard.name): number for number, shard in enumerate(indexed.shards)}
    known = np.zeros(len(listed), dtype=bool)
    rows: dict[int, np.ndarray] = {}
    homes = track(by_shard(listed), "Excluding samples", total=len(numbers), disable=len(listed) < MANY)
    for home, which, wanted in homes:
        number = numbers.get(home)
        if number is not None:
            keys = _as_texts(indexed.indexes[number].records()["key"])
            known[which] = places(wanted, keys) >= 0
            rows[number] = np.flatnonzero((places(keys, wanted) >= 0)[filtered.rows(number)]).astype(np.int32)
    order = sorted(rows)
    ends = np.cumsum([len(rows[number]) for number in order], dtype=np.int64)
    unknown = listed.filter(pa.array(~known))
    return {
        "rows": np.concatenate([np.zeros(0, np.int32), *(rows[number] for number in order)]),
        "shards": np.array(order, dtype=np.int64),
        "bounds": np.stack([ends - [len(rows[number]) for number in order], ends], axis=1) if order else ends[:, None],
        "counts": np.array([len(listed), len(unknown)]),
        "example": np.array([min(unknown.to_pylist()[:MANY], default=b"")], dtype=np.bytes_),
    }


def _as_texts(keys: np.ndarray) -> np.ndarray:
    """Keys as a list that `memtrain` has written holds them, see `as_text`. (n,) bytes -> (n,) bytes"""
    keys = np.ascontiguousarray(keys)
    if (keys.view(np.uint8) < 128).all():
        return keys
    return np.array([as_text(key.decode("utf-8", "surrogateescape")).encode() for key in keys.tolist()], np.bytes_)
