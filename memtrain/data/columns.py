"""Columns of a sample's json, read from the parquet beside a shard or from the json itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def read_columns(
    parquet: Path | bytes | None,
    keys: Sequence[str],
    columns: Sequence[str],
    read_json: Callable[[int], bytes | None],
) -> pa.Table:
    """Columns of the samples `keys` of a shard, nulls where a sample has none. From the parquet beside it, else json.

    Args:
        parquet: its path, its bytes where it lies in a store, or None where there is none.
        read_json: row -> bytes of the sample's json member, or None.
    """
    table = None if parquet is None else _from_parquet(parquet, keys, columns)
    if table is not None:
        return table
    rows = [parse_json(read_json(row)) for row in range(len(keys))]
    return pa.table({name: _array([row.get(name) for row in rows]) for name in columns})


def parse_json(data: bytes | None) -> dict:
    """A sample's json; empty where it is missing or broken. Bare NaN is read as NaN."""
    try:
        found = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _from_parquet(parquet: Path | bytes, keys: Sequence[str], columns: Sequence[str]) -> pa.Table | None:
    """Columns of these samples from a parquet; None where it is missing, broken, or does not know every key once."""
    try:
        source = pa.BufferReader(parquet) if isinstance(parquet, bytes) else parquet
        if not set(columns) | {"key"} <= set(pq.read_schema(source).names):
            return None
        table = pq.read_table(source, columns=[*columns, "key"])
    except (OSError, pa.ArrowInvalid):
        return None
    place = {key: row for row, key in enumerate(table["key"].to_pylist())}
    if len(place) < len(table) or any(key not in place for key in keys):
        return None
    found = table.take(pa.array([place[key] for key in keys], type=pa.int64())).select(list(columns))
    for number, name in enumerate(found.column_names):
        if pa.types.is_floating(found.schema.field(name).type):
            nan_is_null = pc.if_else(pc.is_nan(found[name]), None, found[name])
            found = found.set_column(number, name, nan_is_null)
    return found


def _array(values: list) -> pa.Array:
    """A column of values as found in json: numbers as float64 where they mix, what does not fit as null."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.nulls(len(values))
    if kinds <= {int, float}:
        return pa.array([None if value is None or value != value else float(value) for value in values], pa.float64())
    if kinds <= {bool}:
        return pa.array(values, pa.bool_())
    return pa.array([value if isinstance(value, str) else None for value in values], pa.string())
