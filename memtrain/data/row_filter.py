"""The row filter of a corpus, `data.where`: conditions on the columns of a sample's json.

A filter is what a person would write: `punsafe < 0.1 and similarity > 0.3`, `NSFW == "UNLIKELY"`,
`width >= 512 and not LANGUAGE in ["xx", "yy"]`. It is parsed, never evaluated as code.
"""

from __future__ import annotations

import ast
import hashlib
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memtrain.data.derived import kept_filters
from memtrain.data.indexed import IndexedShards
from memtrain.data.open_shards import OpenShards

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
    """A part of a filter as an expression of pyarrow. Raises TypeError where it is not a condition."""
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
            for compared, one, other in zip(ops, sides[:-1], sides[1:], strict=True):
                part = _COMPARISONS[type(compared)](_side(one), _side(other))
                joined = part if joined is None else joined & part
            return joined
        case ast.Name():
            return _side(node) == pc.scalar(True)
    raise TypeError(f"{ast.unparse(node)!r} is not a condition")


def _name(node: ast.expr) -> str:
    if not isinstance(node, ast.Name):
        raise TypeError(f"{ast.unparse(node)!r} is not a column")
    return node.id


def _constant(node: ast.expr) -> Any:
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


@dataclass(frozen=True)
class FilteredRows:
    """The rows of each shard: the records that a filter passes, all of them where there is none."""

    counts: Sequence[int]
    stems: Sequence[str] | None = None  # STEM.npy holds a shard's rows, as numbers of records
    dropped: Counter[str] = field(default_factory=Counter)  # samples that each condition drops

    def rows(self, number: int) -> np.ndarray | slice:
        """The rows of a shard, as an index into its records."""
        return slice(None) if self.stems is None else np.load(f"{self.stems[number]}.npy")

    def digest(self, number: int) -> str | None:
        """Tells which samples of a shard the filter chose; None where there is no filter."""
        rows = self.rows(number)
        return None if isinstance(rows, slice) else hashlib.sha256(rows.tobytes()).hexdigest()[:16]


def filter_rows(clauses: Sequence[Clause], indexed: IndexedShards) -> FilteredRows:
    """Choose each shard's rows, or find them chosen before in the cache folder."""
    records = [index.samples for index in indexed.indexes]
    if not clauses:
        return FilteredRows(records)
    columns = list(dict.fromkeys(column for clause in clauses for column in clause.columns))
    stems = indexed.derived("where", " and ".join(clause.text for clause in clauses))
    shards = OpenShards(indexed.shards, indexed.indexes, indexed.remote)
    filtered = kept_filters(stems, records, lambda number: apply_filter(clauses, shards.columns(number, columns)))
    dropped: Counter[str] = Counter()
    for _, of_shard in filtered:
        dropped.update(of_shard)
    return FilteredRows([left for left, _ in filtered], stems, dropped)
