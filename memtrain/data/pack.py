"""Write pictures with captions as shards, as img2dataset does: NNNNN.tar, NNNNN.parquet and NNNNN_stats.json.

Every picture has a row in the parquet; what cannot be trained on is named there, and is not in the tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
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

from memtrain.data.distribute import Distributor, Local, Part
from memtrain.data.images import BadSample, decode_image, picture_shape
from memtrain.data.pack_source import Row, open_source, writable
from memtrain.data.packing import PackedShard, Packing, new_aside, note, noted, state_of
from memtrain.data.paths import check_empty
from memtrain.data.shards import IMAGE_EXTENSIONS

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
    distributor: Distributor | None = None,
    part: Part | None = None,
    merge: bool = False,
) -> PackReport:
    """Write `source` as shards to the folder `out`; they appear there when all are whole.

    A call that was stopped goes on with the shards that are not whole yet, or whose rows have changed.

    Args:
        source: a folder, searched to its ends, or a .parquet, .jsonl or .csv whose paths are relative to it.
        shard_size: rows of a shard, failures included.
        resolution: scale the short side down to this many px and re-encode as JPEG; None keeps the bytes.
        progress: wraps the rows and their number.
        distributor: who packs, a shard a task; None: this process.
        part: write these shards alone; `out` appears when `merge` finds those of all parts.
        merge: write none.

    Raises:
        ValueError: `out` is not empty, a number is out of range, `source` or a column of it is missing, no picture of
            it can be trained on, or shards are missing to `merge`.
        OSError: some shards could not be written, however often that was tried.
    """
    for name, value in (("--shard-size", shard_size), ("--resolution", resolution)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    check_empty(out)
    out, mine = out.absolute(), part or Part()  # "." has a name too
    found = open_source(source, caption_column, path_column, reserved=COLUMNS.names)
    schema = pa.unify_schemas([COLUMNS, found.extras])
    settings = [str(source.absolute()), found.count, shard_size, resolution, caption_column, path_column, str(schema)]
    packing = Packing(out, {"made_of": settings}, is_part=merge or mine.count > 1)
    names = [f"{number:0{SHARD_DIGITS}d}" for number in range(-(-found.count // shard_size))]
    with packing.alone(mine):
        if merge:
            packed = [noted(packing.folder, name) for name in names]
            lacking = [name for name, shard in zip(names, packed, strict=True) if shard is None]
            if lacking:
                raise ValueError(
                    f"merge: {len(lacking)} of {len(names)} shards are not packed yet, such as {lacking[0]}.tar; do "
                    "the other parts first, or leave merge out to pack them here"
                )
            shards = [shard for shard in packed if shard is not None]
        else:
            rows = iter(progress(found.rows, found.count))
            shards = _pack_shards(packing.folder, rows, names, mine, shard_size, resolution, schema, distributor)
    failures = [failure for shard in shards for failure in shard.failures]
    report = PackReport(sum(shard.samples for shard in shards), len(shards), found.ignored, failures)
    if mine.count == 1:
        if report.samples == 0:
            packing.discard()
            name, why = (report.failures or [(str(source), "no picture in it")])[0]
            raise ValueError(f"{source}: nothing to pack ({name}: {why})")
        packing.finish()
    return report


def _pack_shards(
    folder: Path, rows: Iterator[Row], names: Sequence[str], part: Part, shard_size: int, resolution: int | None,
    schema: pa.Schema, distributor: Distributor | None,
) -> list[PackedShard]:  # fmt: skip
    """Write the shards of this part, those that are there already left as they are; in their order."""
    mine = list(part.of(len(names)))
    digits = max(ROW_DIGITS, len(str(shard_size - 1)))

    def tasks() -> Iterator[_Shard]:
        for number, name in enumerate(names):
            some = list(islice(rows, shard_size))
            keys = [f"{number * 10**digits + row:0{SHARD_DIGITS + digits}d}" for row in range(len(some))]
            if number in part.of(len(names)):
                yield _Shard(folder, name, some, keys, resolution, schema)

    done = list((distributor or Local()).run(_pack_shard, tasks(), name=lambda shard: f"{shard.name}.tar"))
    left = [(names[mine[one.index]], one.failure) for one in done if one.result is None]
    if left:
        name, why = left[0]
        raise OSError(f"{len(left)} shards could not be packed, such as {name}.tar ({why}); the same command goes on")
    return [one.result for one in sorted(done, key=lambda one: one.index) if one.result is not None]


@dataclass(frozen=True)
class _Shard:
    """A shard to be written into a folder."""

    folder: Path
    name: str
    rows: list[Row]
    keys: list[str]
    resolution: int | None
    schema: pa.Schema


def _pack_shard(shard: _Shard) -> PackedShard:
    """Write a shard, unless one of the same rows is there; aside, as whoever began it before may still be writing."""
    state, there = state_of(shard.rows), noted(shard.folder, shard.name)
    if there is not None and there.rows == state:
        return there
    aside = new_aside(shard.folder)
    try:
        failures = write_shard(aside / shard.name, shard.rows, shard.keys, shard.resolution, shard.schema)
        packed = PackedShard(state, len(shard.rows) - len(failures), failures)
        note(shard.folder, shard.name, packed, aside)
    finally:
        shutil.rmtree(aside)
    return packed


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
    """The bytes of a row's picture. Raises BadSample where there are none."""
    if row.problem:
        raise BadSample(row.problem)
    try:
        if not row.path.is_file():  # a pipe or a device would never end
            raise BadSample("no such file")
        return row.path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise BadSample(f"file cannot be read ({type(error).__name__})") from error


def _encode_image(
    data: bytes, extension: str, resolution: int | None
) -> tuple[str, bytes, tuple[int, int], tuple[int, int]]:
    """A picture as it is packed: extension, bytes, (height, width) now and before. Raises BadSample if not whole."""
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
        pixels = decode_image(data, height, width).transpose(1, 2, 0)  # (3, height, width) -> (height, width, 3)
        image = Image.fromarray(pixels.copy())
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
        return writable(value if isinstance(value, str) else json.dumps(value))
    return value
