"""What is packed: a folder of pictures with .txt files of the same stem, or a table of paths and captions."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.data.paths import TABLES, check_pictures
from memtrain.data.shards import IMAGE_EXTENSIONS

OTHER_EXTENSIONS = ("bmp", "gif", "tif", "tiff")  # pictures that a shard cannot hold, unless re-encoded


@dataclass(frozen=True)
class Row:
    """A picture to be packed. `problem` says why it has no caption, or no path."""

    path: Path
    url: str
    caption: str | None
    problem: str | None = None
    extras: dict[str, Any] = field(default_factory=dict)  # columns of its own


@dataclass(frozen=True)
class Source:
    """Pictures to be packed, and the types of their own columns."""

    count: int
    rows: Iterable[Row]
    extras: pa.Schema
    ignored: int = 0  # files that are neither a picture nor the caption of one


def open_source(source: Path, caption_column: str, path_column: str, reserved: Collection[str]) -> Source:
    """Open a folder or a table of pictures. Tables are read through once, for their columns and number of rows.

    Args:
        reserved: columns that have a meaning already, and are no extras.

    Raises:
        ValueError: it is neither, cannot be read, or lacks a column.
    """
    check_pictures(source)
    if source.is_dir():
        return _open_folder(source)
    reader = dict(zip(TABLES, (_open_parquet, _open_jsonl, _open_csv), strict=True))[source.suffix.lower()]
    count, columns, records = reader(source)
    for option, name in (("--caption-column", caption_column), ("--path-column", path_column)):
        if name not in columns.names:
            known = ", ".join(columns.names) or "none"
            raise ValueError(f"{source} has no column {name!r}; choose {option} from {known}")
    repeated = [name for name, times in Counter(columns.names).items() if times > 1]
    if repeated:
        raise ValueError(f"{source} has two columns {repeated[0]!r}; rename one")
    extras = pa.schema([c for c in columns if c.name not in {caption_column, path_column, *reserved}])
    rows = (_row(source.parent, record, caption_column, path_column) for record in records())
    return Source(count, rows, extras)


def _row(folder: Path, record: dict, caption_column: str, path_column: str) -> Row:
    """A record of a table as a row to be packed; its paths are relative to `folder`."""
    caption, path, url = record.get(caption_column), record.get(path_column), record.get("url")
    extras = {name: value for name, value in record.items() if name not in (caption_column, path_column)}
    named = path if isinstance(path, str) else ""
    problem = None if named else "no path"
    if not isinstance(caption, str):
        caption, problem = None, problem or "no caption"
    return Row(
        folder / named,
        writable(url if isinstance(url, str) and url else named),
        caption and writable(caption.strip()),
        problem,
        extras,
    )


def _open_folder(folder: Path) -> Source:
    files = list(_files(folder))
    pictures = [path for path in files if path.suffix[1:].lower() in IMAGE_EXTENSIONS + OTHER_EXTENSIONS]
    captions = {path.with_suffix(".txt") for path in pictures}.intersection(files)
    ignored = len(files) - len(pictures) - len(captions)
    return Source(len(pictures), (_picture(path, folder) for path in pictures), pa.schema([]), ignored)


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted, links followed; a folder that is linked into itself comes once."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(parent) / name for name in sorted(names))


def _picture(path: Path, folder: Path) -> Row:
    """A picture in a folder as a row to be packed, with the caption beside it."""
    url = writable(path.relative_to(folder).as_posix())
    try:
        return Row(path, url, path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip())
    except FileNotFoundError:
        return Row(path, url, None, "no caption")
    except UnicodeDecodeError:
        return Row(path, url, None, "caption is not UTF-8")
    except OSError as error:
        return Row(path, url, None, f"caption cannot be read ({type(error).__name__})")


Records = tuple[int, pa.Schema, Callable[[], Iterator[dict]]]  # how many, their columns, and they themselves


def _open_parquet(path: Path) -> Records:
    try:
        file = pq.ParquetFile(path, pre_buffer=False)  # else all that was read stays in memory
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a whole parquet file ({str(error).splitlines()[0]})") from error

    def records() -> Iterator[dict]:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()

    return file.metadata.num_rows, file.schema_arrow.remove_metadata(), records


def _open_jsonl(path: Path) -> Records:
    def records() -> Iterator[dict]:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse_line(line, f"{path}, line {number}")

    kinds: dict[str, set[type]] = {}
    count = 0
    for record in records():
        count += 1
        for name, value in record.items():
            kinds.setdefault(name, set()).add(_kind(value))
    columns = [(name, _arrow_type(kinds[name] - {type(None)})) for name in kinds]
    return count, pa.schema(columns), records


def _parse_line(line: str, place: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not json ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not a json object; write one a line")
    return {writable(name): value for name, value in record.items()}


def _kind(value: Any) -> type:
    """The type of a json value; `object` for whole numbers that no int64 holds."""
    return object if type(value) is int and abs(value) >= 2**63 else type(value)


def _arrow_type(kinds: set[type]) -> pa.DataType:
    """The type of a column of json values of these kinds; a string (of json) where they mix."""
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def _open_csv(path: Path) -> Records:
    def records() -> Iterator[dict]:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.DictReader(file)
            try:
                for record in reader:
                    record.pop(None, None)  # cells beyond the header
                    yield record
            except csv.Error as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error

    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        names = next(csv.reader(file), [])
    return sum(1 for _ in records()), pa.schema([(name, pa.string()) for name in names]), records


def writable(value: str) -> str:
    """The text without halves of surrogate pairs, of file names or json, which UTF-8 cannot hold."""
    return value.encode("utf-8", errors="replace").decode()
