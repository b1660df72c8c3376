"""Write pictures with captions as shards, as img2dataset does: NNNNN.tar, NNNNN.parquet and NNNNN_stats.json.

What is packed is a folder of pictures with .txt files of the same stem, or a table of paths and captions.
Every picture has a row in the parquet; what cannot be trained on is named there, and is not in the tar.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image
from webdataset import TarWriter

from memtrain.data.images import BadSample, decode_image, picture_shape
from memtrain.data.shards import IMAGE_EXTENSIONS

OTHER_EXTENSIONS = ("bmp", "gif", "tif", "tiff")  # pictures that a shard cannot hold, unless re-encoded
SHARD_DIGITS, ROW_DIGITS = 5, 4  # of a key, at least
JPEG_QUALITY = 95  # img2dataset's default

COLUMNS = pa.schema(
    [
        ("caption", pa.string()),
        ("url", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
    ]
)


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


@dataclass
class PackReport:
    """What was written. `failures`: (path as given, why) of each picture that was not."""

    samples: int = 0
    shards: int = 0
    ignored: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def pack(
    source: Path,
    out: Path,
    shard_size: int = 10_000,
    resolution: int | None = None,
    caption_column: str = "caption",
    path_column: str = "path",
    progress: Callable[[Iterable, int], Iterable] = lambda rows, count: rows,
) -> PackReport:
    """Write `source` as shards to the folder `out`; they appear there when all are whole.

    Args:
        source: a folder, searched to its ends, or a .parquet, .jsonl or .csv whose paths are relative to it.
        shard_size: rows of a shard, failures included.
        resolution: scale the short side down to this many px and re-encode as JPEG; None keeps the bytes.
        progress: wraps the rows and their number.

    Raises:
        ValueError: `out` is not empty, a number is out of range, `source` or a column of it is missing, or no
            picture of it can be trained on.
    """
    for name, value in (("--shard-size", shard_size), ("--resolution", resolution)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"{out} is there and is not an empty folder; delete it or choose another")
    out = out.absolute()  # "." has a name too
    found = open_source(source, caption_column, path_column)
    report = PackReport(ignored=found.ignored)
    rows = iter(progress(found.rows, found.count))
    schema = pa.unify_schemas([COLUMNS, found.extras])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=out.name, suffix=".tmp", dir=out.parent) as holder:
        aside = Path(holder) / out.name
        aside.mkdir()
        while part := list(islice(rows, shard_size)):
            number, digits = report.shards, max(ROW_DIGITS, len(str(shard_size - 1)))
            keys = [f"{number * 10**digits + row:0{SHARD_DIGITS + digits}d}" for row in range(len(part))]
            failures = write_shard(aside / f"{number:0{SHARD_DIGITS}d}", part, keys, resolution, schema)
            report.failures += failures
            report.samples += len(part) - len(failures)
            report.shards += 1
        if report.samples == 0:
            name, why = (report.failures or [(str(source), "no picture in it")])[0]
            raise ValueError(f"{source}: nothing to pack ({name}: {why})")
        os.replace(aside, out)  # in place of an empty folder too
    return report


def write_shard(
    stem: Path, rows: Sequence[Row], keys: Sequence[str], resolution: int | None, schema: pa.Schema
) -> list[tuple[str, str]]:
    """Write tar, parquet and, last, stats, whose names begin with `stem`. Returns (path, why) of failures."""
    start, written = time.time(), []
    with open(f"{stem}.tar", "wb") as file, TarWriter(file, mtime=0) as tar:
        for row, key in zip(rows, keys, strict=True):
            metadata, member = encode(row, key, resolution)
            written.append(metadata)
            if member is not None:
                text = json.dumps(metadata, indent=4, default=str)
                extension, image = member
                caption = metadata["caption"].encode()
                tar.write({"__key__": key, extension: image, "txt": caption, "json": text.encode()})
    cells = [{c.name: _cell(metadata.get(c.name), c.type) for c in schema} for metadata in written]
    pq.write_table(pa.Table.from_pylist(cells, schema), f"{stem}.parquet")
    statuses = Counter(metadata["status"] for metadata in written)
    stats = {
        "count": len(written),
        "successes": statuses["success"],
        "failed_to_download": statuses["failed_to_download"],
        "failed_to_resize": statuses["failed_to_resize"],
        "duration": time.time() - start,
        "start_time": start,
        "end_time": time.time(),
        "status_dict": Counter(metadata["error_message"] or metadata["status"] for metadata in written),
    }
    Path(f"{stem}_stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")
    return [(row["url"], row["error_message"]) for row in written if row["error_message"]]


def encode(row: Row, key: str, resolution: int | None) -> tuple[dict[str, Any], tuple[str, bytes] | None]:
    """The metadata of a row, and extension and bytes of its image; None where its status is no success.

    Sizes are those of the picture held upright.
    """
    metadata = dict.fromkeys(COLUMNS.names) | {"caption": row.caption, "url": row.url, "key": key}
    metadata |= {name: value for name, value in row.extras.items() if name not in metadata}
    status = "failed_to_download"
    try:
        data = _read(row)
        status = "failed_to_resize"
        extension, image, size, original = _encode_image(data, row.path.suffix[1:].lower(), resolution)
    except BadSample as problem:
        return metadata | {"status": status, "error_message": str(problem)}, None
    metadata |= {
        "status": "success",
        "width": size[1],
        "height": size[0],
        "original_width": original[1],
        "original_height": original[0],
        "exif": _exif(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return metadata, (extension, image)


def _read(row: Row) -> bytes:
    if row.problem:
        raise BadSample(row.problem)
    try:
        if not row.path.is_file():  # a pipe or a device would never end
            raise BadSample("no such file")
        return row.path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise BadSample(f"file cannot be read ({type(error).__name__})") from error


def _encode_image(data: bytes, extension: str, resolution: int | None):
    """Extension, bytes, (height, width) now and before. Raises BadSample where the picture is not whole."""
    original = picture_shape(data)  # a square of 1 px where it cannot be decoded
    if resolution is None:
        if extension not in IMAGE_EXTENSIONS:
            raise BadSample(f"not a {', '.join(IMAGE_EXTENSIONS)} by its name; --resolution re-encodes it")
        decode_image(data, 64, 64)
        return extension, data, original, original
    scale = min(1.0, resolution / min(original))
    height, width = (max(1, round(side * scale)) for side in original)
    encoded = io.BytesIO()
    try:
        image = Image.fromarray(decode_image(data, height, width).transpose(1, 2, 0).copy())
        image.save(encoded, "JPEG", quality=JPEG_QUALITY)
    except (OSError, ValueError) as error:  # more than 65,500 px long
        raise BadSample(f"image cannot be encoded as JPEG ({type(error).__name__})") from error
    return "jpg", encoded.getvalue(), (height, width), original


def _exif(data: bytes) -> str | None:
    """The EXIF tags as a json string, without those that are bytes; None where they cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif = Image.open(io.BytesIO(data)).getexif()
            tags = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
            named = {ExifTags.TAGS.get(tag, str(tag)): value for tag, value in tags.items()}
            texts = {name: str(value) for name, value in named.items() if not isinstance(value, bytes)}
            return json.dumps(texts)
    except Exception:  # a damaged tag costs no picture
        return None


def _cell(value: Any, kind: pa.DataType) -> Any:
    """A value that fits its column of the parquet: json, where a column of text has other values."""
    if value is None:
        return None
    if pa.types.is_floating(kind):
        return float(value)
    if pa.types.is_string(kind):
        return _text(value if isinstance(value, str) else json.dumps(value))
    return value


def _text(value: str) -> str:
    """Without halves of surrogate pairs, of file names or json, which UTF-8 cannot hold."""
    return value.encode("utf-8", errors="replace").decode()


# ---- what is packed


def open_source(source: Path, caption_column: str, path_column: str) -> Source:
    """A folder or a table. Tables are read through once, for their columns and number of rows."""
    if source.is_dir():
        return _open_folder(source)
    readers = {".parquet": _open_parquet, ".jsonl": _open_jsonl, ".csv": _open_csv}
    reader = readers.get(source.suffix.lower())
    if reader is None or not source.is_file():
        raise ValueError(f"{source} is neither a folder nor a {', '.join(readers)} file; name one of these")
    count, columns, records = reader(source)
    for option, name in (("--caption-column", caption_column), ("--path-column", path_column)):
        if name not in columns.names:
            known = ", ".join(columns.names) or "none"
            raise ValueError(f"{source} has no column {name!r}; choose {option} from {known}")
    repeated = [name for name, times in Counter(columns.names).items() if times > 1]
    if repeated:
        raise ValueError(f"{source} has two columns {repeated[0]!r}; rename one")
    extras = pa.schema([c for c in columns if c.name not in {caption_column, path_column, *COLUMNS.names}])
    rows = (_row(source.parent, record, caption_column, path_column) for record in records())
    return Source(count, rows, extras)


def _row(folder: Path, record: dict, caption_column: str, path_column: str) -> Row:
    caption, path, url = record.get(caption_column), record.get(path_column), record.get("url")
    extras = {name: value for name, value in record.items() if name not in (caption_column, path_column)}
    named = path if isinstance(path, str) else ""
    problem = None if named else "no path"
    if not isinstance(caption, str):
        caption, problem = None, problem or "no caption"
    return Row(
        folder / named,
        _text(url if isinstance(url, str) and url else named),
        caption and _text(caption.strip()),
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
    url = _text(path.relative_to(folder).as_posix())
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
        file = pq.ParquetFile(path)
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
    return {_text(name): value for name, value in record.items()}


def _kind(value: Any) -> type:
    return object if type(value) is int and abs(value) >= 2**63 else type(value)


def _arrow_type(kinds: set[type]) -> pa.DataType:
    """Of a column of json values; a string (of json) where they mix."""
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
