"""Samples that a list leaves out of a corpus, `data.exclude_keys`."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.progress import track

from memtrain.data.escaping import as_text
from memtrain.data.indexed import IndexedShards
from memtrain.data.paths import KEYS, check_file
from memtrain.data.row_filter import FilteredRows
from memtrain.data.sources import home_of

log = logging.getLogger(__name__)


def read_keys(path: str | Path) -> frozenset[str]:
    """The sample keys (shard path and `__key__`) in a list: a parquet's column `key`, or the lines of a .txt.

    Raises:
        ValueError: the list cannot be read, or has no such column.
    """
    file = check_file("data.exclude_keys", path, KEYS)
    try:
        if file.suffix == ".txt":
            lines = file.read_text(encoding="utf-8").splitlines()
            return frozenset(line.strip() for line in lines if line.strip())
        if "key" not in pq.read_schema(file).names:
            raise ValueError("it has no column key")
        keys = pq.read_table(file, columns=["key"])["key"]
        return frozenset(str(key) for key in keys.to_pylist() if key is not None)
    except (OSError, ValueError) as error:  # pyarrow's are ValueErrors too
        raise ValueError(f"data.exclude_keys={path} cannot be read ({str(error).splitlines()[0]}); {KEYS}") from error


def excluded_rows(
    listed: frozenset[str], path: str | Path, indexed: IndexedShards, filtered: FilteredRows
) -> dict[int, np.ndarray]:
    """Shard -> rows of it whose samples are on the list, sorted. Rows keep their numbers, as caches need it.

    Args:
        listed: sample keys, see `read_keys`.
        path: of the list, for what is said of it.

    Raises:
        ValueError: none of the keys is in the corpus.
    """
    excluded: dict[int, np.ndarray] = {}
    homes = {home_of(name) for name in listed}
    unknown = set(listed)
    numbers = [number for number, shard in enumerate(indexed.shards) if shard.name in homes]
    for number in track(numbers, "Excluding samples", disable=len(numbers) < 20):
        keys = indexed.indexes[number].records()["key"].tolist()
        shard = indexed.shards[number].name
        names = [as_text(f"{shard}/{key.decode('utf-8', 'surrogateescape')}") for key in keys]
        unknown.difference_update(names)
        is_listed = np.array([name in listed for name in names], dtype=bool)
        excluded[number] = np.flatnonzero(is_listed[filtered.rows(number)])
    if len(unknown) == len(listed):
        raise ValueError(
            f"data.exclude_keys={path}: none of its {len(listed)} keys, such as {min(unknown)}, is in "
            "data.shards; was the list made from another corpus?"
        )
    log.info("data.exclude_keys drops %d samples: %s", sum(map(len, excluded.values())), path)
    if unknown:
        log.warning(
            "data.exclude_keys: %d of its %d keys are not in data.shards, such as %s",
            len(unknown), len(listed), min(unknown),
        )  # fmt: skip
    return excluded
