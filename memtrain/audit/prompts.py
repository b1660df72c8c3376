"""Prompts from a file: txt, csv, jsonl or parquet, with labels and groups where a column has them."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from memtrain.data.escaping import of_cell
from memtrain.data.paths import check_file

log = logging.getLogger(__name__)

COLUMNS = ("caption", "Caption", "prompt", "Prompt", "text", "TEXT")  # tried in this order
MEMORIZED = ("memorized", "canary", "1", "true", "yes")
OTHER = ("other", "reference", "0", "false", "no")
FORMATS = (".txt", ".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Prompts:
    texts: list[str]
    labels: list[bool] | None  # True = memorized
    groups: list[str] | None
    source: str  # the file, for messages

    def __len__(self) -> int:
        return len(self.texts)


def read_prompts(
    path: str | Path, column: str | None = None, label: str | None = None, group: str | None = None
) -> Prompts:
    """Prompts of a file, in its order; empty ones say nothing and are left out (counted in the log).

    Args:
        path: `.txt` (a prompt a line), `.csv` (`,` or `;`), `.jsonl` (objects or strings) or `.parquet`.
        column: that holds the prompts; None tries the usual names (COLUMNS).
        label: column that tells memorized (`memorized`, `canary`, 1, true, yes) from other (`other`,
            `reference`, 0, false, no). Rows with any other value are left out.
        group: column whose values are reported apart.

    Raises:
        ValueError: in one line, no such file, another format, an empty file, a column that is not there.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".txt":
        for key, name in (("column", column), ("label", label), ("group", group)):
            if name is not None:
                raise ValueError(f"prompts.{key}={name}: {path} is plain text, it has no columns; leave it out")
        column = "text"
    rows = read_rows(path, [name for name in (column, label, group) if name is not None])
    if not rows:
        raise ValueError(f"prompts={path} is empty; it needs at least one prompt")
    names = list(dict.fromkeys(name for row in rows for name in row))
    column = column or next((name for name in COLUMNS if name in names), None)
    if column is None:
        raise ValueError(
            f"prompts={path} has no column {', '.join(COLUMNS)}; say prompts.column=NAME, of {_list(names)}"
        )
    for key, name in (("column", column), ("label", label), ("group", group)):
        if name is not None and name not in names:
            raise ValueError(f"prompts.{key}={name}: {path} has no such column, but {_list(names)}")
    spoken = [row for row in rows if _said(row.get(column)).strip()]
    if len(spoken) < len(rows):
        log.info("%s: %d of %d prompts are empty and left out", path, len(rows) - len(spoken), len(rows))
    if not spoken:
        raise ValueError(f"prompts={path}: column {column} is empty in every row; name another with prompts.column=")
    prompts = Prompts(
        texts=[_said(row[column]).strip() for row in spoken],
        labels=None,
        groups=None if group is None else [_said(row.get(group)) for row in spoken],
        source=str(path),
    )
    return prompts if label is None else _labelled(prompts, [_said(row.get(label)) for row in spoken], label)


def read_rows(
    path: str | Path, wanted: list[str], also: Sequence[str] = (), key: str = "prompts", remedy: str | None = None
) -> list[dict]:
    """The rows of a list of prompts, in its order.

    Args:
        wanted: columns that are asked for, beside those that may hold prompts.
        also: columns that are read where they are there.
        key: what the user called the list.
        remedy: what to name in place of a file that is not there.

    Raises:
        ValueError: in one line, no such file, another format, or a damaged file.
    """
    path = check_file(key, path, remedy or f"name a file ({', '.join(FORMATS)})")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{key}={path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(FORMATS)}"
        )
    if path.suffix.lower() == ".txt":
        return [{"text": line} for line in _text(path).split("\n")]  # a caption may hold what splitlines splits at
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path, [*wanted, *also])
    return {".csv": _csv_rows, ".jsonl": _jsonl_rows}[path.suffix.lower()](path, wanted)


def _labelled(prompts: Prompts, values: list[str], column: str) -> Prompts:
    """Of the rows whose label is understood."""
    known = [label_of(value) for value in values]
    kept = [place for place, value in enumerate(known) if value in MEMORIZED + OTHER]
    if not kept:
        seen = [value for value, _ in Counter(values).most_common(5)]
        raise ValueError(
            f"prompts.label={column}: {prompts.source} has {_list(seen)} there; "
            f"use one of {', '.join(MEMORIZED)} or {', '.join(OTHER)}"
        )
    if len(kept) < len(values):
        log.info("%s: %d prompts have another %s and are left out", prompts.source, len(values) - len(kept), column)
    return replace(
        prompts,
        texts=[prompts.texts[place] for place in kept],
        labels=[known[place] in MEMORIZED for place in kept],
        groups=None if prompts.groups is None else [prompts.groups[place] for place in kept],
    )


def label_of(value: object) -> str:
    """A label as it is compared: 1.0 is the 1 of a column with gaps."""
    return str(value).strip().lower().removesuffix(".0")


def together(memorized: Prompts, other: Prompts) -> Prompts:
    """Two files, one labelled list. A file without groups has one, named ''."""
    groups = None
    if memorized.groups is not None or other.groups is not None:
        groups = [*(memorized.groups or [""] * len(memorized)), *(other.groups or [""] * len(other))]
    return Prompts(
        texts=[*memorized.texts, *other.texts],
        labels=[True] * len(memorized) + [False] * len(other),
        groups=groups,
        source=f"{memorized.source}, {other.source}",
    )


def _said(value: object) -> str:
    """As text that can be stored: half a surrogate pair, which JSON can spell, becomes a question mark."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _list(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:12])
    return shown + (", …" if len(names) > 12 else "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={path} is not UTF-8 (byte {error.start}); convert it") from error


def _csv_rows(path: Path, wanted: list[str]) -> list[dict]:
    """The delimiter is the one whose header has the wanted columns, or a usual one, or the most columns."""
    text = _text(path)
    if not text.strip():
        return []

    def fitness(delimiter: str) -> tuple[bool, bool, int]:
        header = next(csv.reader(io.StringIO(text), delimiter=delimiter))
        known = any(name in header for name in COLUMNS)
        return all(name in header for name in wanted), known, len(header)

    try:
        reader = csv.DictReader(io.StringIO(text), delimiter=max(",;", key=fitness), restkey="")
        rows = []
        for row in reader:
            if "" in row and isinstance(row[""], list):
                raise ValueError(
                    f"prompts={path}, line {reader.line_num}: more fields than the header's "
                    f"{len(reader.fieldnames)}; quote a caption that contains the delimiter"
                )
            rows.append({name: of_cell(text) for name, text in row.items()})
        return rows
    except csv.Error as error:
        raise ValueError(f"prompts={path} is no csv: {error}") from error


def _jsonl_rows(path: Path, wanted: list[str]) -> list[dict]:
    """A string stands for {"text": string}."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"prompts={path}, line {number} is no JSON: {error}") from error
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise ValueError(
                f"prompts={path}, line {number}: an object or a string is needed, got {type(row).__name__}"
            )
        rows.append(row)
    return rows


def _parquet_rows(path: Path, wanted: list[str]) -> list[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        chosen = [name for name in dict.fromkeys([*wanted, *COLUMNS]) if name in names]
        rows = pq.read_table(path, columns=chosen).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"prompts={path} is no parquet file: {str(error).splitlines()[0]}") from error
    others = dict.fromkeys(name for name in names if name not in chosen)
    return [others | row for row in rows]  # a message about a wrong column lists them all
