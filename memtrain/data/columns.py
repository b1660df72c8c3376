"""Columns of a sample's json, filters on them, and lists of samples.

A filter is what a person would write: `punsafe < 0.1 and similarity > 0.3`, `NSFW == "UNLIKELY"`,
`width >= 512 and not LANGUAGE in ["xx", "yy"]`. It is parsed, never evaluated as code.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from memtrain.data.paths import KEYS, check_file

_COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


@dataclass(frozen=True)
class Clause:
    """One condition of a filter: its text, the columns it reads, and the expression."""

    text: str
    columns: tuple[str, ...]
    expression: pc.Expression


def parse_filter(text: str) -> list[Clause]:
    """The conditions that a filter joins with `and`.

    Raises:
        ValueError: it is not made of comparisons of columns and constants, `in`, `and`, `or`, `not`.
    """
    try:
        tree = ast.parse(text, mode="eval").body
        parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
        return [
            Clause(
                ast.unparse(part),
                tuple(dict.fromkeys(node.id for node in ast.walk(part) if isinstance(node, ast.Name))),
                _condition(part),
            )
            for part in parts
        ]
    except (SyntaxError, TypeError, pa.ArrowInvalid, RecursionError) as error:
        raise ValueError(
            f"data.where={text}: {getattr(error, 'msg', None) or error}; "
            'write comparisons of json columns, such as "punsafe < 0.1 and similarity > 0.3"'
        ) from error


def _condition(node: ast.expr) -> pc.Expression:
    match node:
        case ast.BoolOp(op=op, values=values):
            joined = _condition(values[0])
            for value in values[1:]:
                joined = joined & _condition(value) if isinstance(op, ast.And) else joined | _condition(value)
            return joined
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_condition(operand)
        case ast.Compare(left=left, ops=[ast.In() | ast.NotIn() as op], comparators=[ast.List() | ast.Tuple() as many]):
            column = pc.field(_name(left))
            found = reduce(operator.or_, (column == _constant(item) for item in many.elts))
            return found if isinstance(op, ast.In) else ~found
        case ast.Compare(left=left, ops=ops, comparators=right) if all(type(op) in _COMPARISONS for op in ops):
            sides = [left, *right]  # 0.3 < similarity < 0.5 compares neighbours
            joined = None
            for op, one, other in zip(ops, sides[:-1], sides[1:], strict=True):
                part = _COMPARISONS[type(op)](_side(one), _side(other))
                joined = part if joined is None else joined & part
            return joined
        case ast.Name():
            return _side(node) == pc.scalar(True)
    raise TypeError(f"{ast.unparse(node)!r} is not a condition")


def _name(node: ast.expr) -> str:
    if not isinstance(node, ast.Name):
        raise TypeError(f"{ast.unparse(node)!r} is not a column")
    return node.id


def _constant(node: ast.expr):
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise TypeError(f"{ast.unparse(node)!r} is neither a column nor a constant") from None


def _side(node: ast.expr) -> pc.Expression:
    return pc.field(node.id) if isinstance(node, ast.Name) else pc.scalar(_constant(node))


def apply_filter(clauses: Sequence[Clause], table: pa.Table) -> tuple[np.ndarray, dict[str, int]]:
    """The rows that pass, and how many rows each clause drops of those that passed the ones before.

    A null, NaN or missing value passes no comparison.

    Raises:
        ValueError: a column cannot be compared as the filter says.
    """
    rows = pa.array(np.arange(len(table), dtype=np.int64))
    table, dropped = table.append_column("__row__", rows), {}
    for clause in clauses:
        before = len(table)
        try:
            table = table.filter(clause.expression)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise ValueError(
                f"data.where: {clause.text!r} does not fit the column's values ({str(error).splitlines()[0]}); "
                "compare numbers with numbers and text with text"
            ) from error
        dropped[clause.text] = before - len(table)
    return table["__row__"].to_numpy(), dropped


def read_columns(shard: Path, keys: Sequence[str], columns: Sequence[str], read_json) -> pa.Table:
    """Columns of the samples `keys` of a shard, nulls where a sample has none. From the parquet beside it, else json.

    Args:
        read_json: row -> bytes of the sample's json member, or None.
    """
    table = _from_parquet(shard.with_suffix(".parquet"), keys, columns)
    if table is not None:
        return table
    rows = [parse_json(read_json(row)) for row in range(len(keys))]
    return pa.table({name: _array([row.get(name) for row in rows]) for name in columns})


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
        raise ValueError(
            f"data.exclude_keys={path} cannot be read ({str(error).splitlines()[0]}); {KEYS}"
        ) from error


def parse_json(data: bytes | None) -> dict:
    """A sample's json; empty where it is missing or broken. Bare NaN is read as NaN."""
    try:
        found = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _from_parquet(path: Path, keys: Sequence[str], columns: Sequence[str]) -> pa.Table | None:
    """None where the parquet is missing, broken, or does not know every key once."""
    try:
        if not set(columns) | {"key"} <= set(pq.read_schema(path).names):
            return None
        table = pq.read_table(path, columns=[*columns, "key"])
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
    """Values as found in json: numbers as float64 where they mix, anything that does not fit as null."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.nulls(len(values))
    if kinds <= {int, float}:
        return pa.array([None if value is None or value != value else float(value) for value in values], pa.float64())
    if kinds <= {bool}:
        return pa.array(values, pa.bool_())
    return pa.array([value if isinstance(value, str) else None for value in values], pa.string())
