"""Find the shards of a corpus and index them: which samples a tar holds, and where their bytes lie.

A shard is scanned once, header by header; samples are then read by offset, so an image can only ever meet
the caption that lies under its own key in its own shard.

A shard that was cut and joined to another, or filled up with zeros (a download that was resumed, appended or
broken off), looks like a tar all the same. So a sample is skipped, counted and named where one of its members

- is not followed by zeros up to the next block of 512 bytes;
- has neither a header with a right checksum behind it, nor an end-of-archive mark, nor the end of the file;
- holds the header of another member, on whatever byte: what was joined begins inside it. Images are looked
  through when they are decoded, all else while the shard is scanned;
- ends in zeros, and is a caption, a json or the last image before the end-of-archive mark.

Behind a break or an end-of-archive mark nothing is read. No header tells of a splice that begins and ends on the
same byte of a block and takes all headers between with it; then the decoder alone may find the image broken.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from memtrain.data.paths import expand

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
DAMAGED = "shard is broken inside this sample or right behind it"
_TEXTS = ("txt", "json")
_MANY_ZEROS = 16  # bytes: more than a whole WebP ends in
_BLOCK, _MAGIC = 512, 257  # bytes of a header, and where in it `ustar` stands


def find_shards(spec: str | Sequence[str]) -> list[Path]:
    """The tars that `data.shards` names, sorted within a folder and kept in order within a list.

    Args:
        spec: a folder, a tar, a brace pattern such as `shards/{00000..00041}.tar`, or a list of these.

    Raises:
        ValueError: nothing is there, or what is named is not on a local disk.
    """
    shards: list[Path] = []
    for part in [spec] if isinstance(spec, str) else spec:
        if "://" in part or part.startswith("pipe:"):
            raise ValueError(f"data.shards={part}: only shards on disk can be read; copy them to a folder first")
        path = Path(part).expanduser()
        if path.is_dir():
            found = [path / name for name in sorted(os.listdir(path)) if name.endswith(".tar")]
            if not found:
                raise ValueError(f"data.shards={part}: the folder has no .tar in it; name a folder of shards")
        else:
            found = [Path(url) for url in expand(str(path))]
            missing = [str(shard) for shard in found if not shard.is_file()]
            if missing:
                more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
                raise ValueError(
                    f"data.shards={part}: no such shard: {missing[0]}{more}; name a folder, a tar or a brace pattern"
                )
        shards += found
    if not shards:
        raise ValueError("data.shards is empty; name a folder, a tar or a brace pattern")
    repeated = [str(shard) for shard, count in Counter(shards).items() if count > 1]
    if repeated:
        raise ValueError(f"data.shards names {repeated[0]} twice; name each shard once")
    return shards


@dataclass(frozen=True)
class Extent:
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class Entry:
    """One sample of a shard that has an image and a caption."""

    key: str
    image: Extent
    caption: Extent
    metadata: Extent | None = None  # the json member


@dataclass
class ShardIndex:
    """What a tar holds. `skipped` lists (key or member name or "", why)."""

    path: Path
    entries: list[Entry] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def holds_header(data: bytes) -> bool:
    """Whether a block of a member's bytes is the header of a tar's member: then they are not all its own.

    Headers between blocks are found while a shard is scanned: once they begin, no other begins on a block.
    """
    candidates = data[_MAGIC::_BLOCK]  # a byte of each block: 200 times faster than to search them all
    block = candidates.find(b"u")
    while block >= 0:
        if _is_header_with_magic(data[block * _BLOCK : (block + 1) * _BLOCK]):
            return True
        block = candidates.find(b"u", block + 1)
    return False


def _holds_header_anywhere(data: bytes) -> bool:
    """Whether a header of a tar begins on any byte of the data."""
    place = data.find(b"ustar", _MAGIC)
    while place >= 0:
        if _is_header_with_magic(data[place - _MAGIC : place - _MAGIC + _BLOCK]):
            return True
        place = data.find(b"ustar", place + 1)
    return False


def _is_header_with_magic(data: bytes) -> bool:
    """Whether a block with `ustar` in it is a header; it may be cut short, as the zeros that end one may lie behind."""
    return data[_MAGIC : _MAGIC + 5] == b"ustar" and _is_header(data.ljust(_BLOCK, b"\0"))


def _is_header(block: bytes) -> bool:
    """Whether a block is the header of a tar's member, its checksum right."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _ends_in_zeros(data: bytes) -> bool:
    """Whether data ends in zeros, two at least: text in UTF-16 and a WebP may end in one."""
    return data[-2:] == b"\0\0"


@dataclass(slots=True)
class _Member:
    """A regular file of a tar. `damaged`: its bytes may not be its own."""

    key: str
    extension: str  # lower case
    extent: Extent
    damaged: bool = False

    @property
    def is_image(self) -> bool:
        return self.extension in IMAGE_EXTENSIONS


def _members(path: Path, skipped: list[tuple[str, str]]) -> Iterator[_Member]:
    """Every regular file in a tar that is not cut off, in file order."""
    size = path.stat().st_size
    if size == 0:
        skipped.append(("", "shard is empty"))
        return
    last: _Member | None = None  # held back until it is known what lies behind it
    end, problem = 0, ""
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if last is not None:
                        yield last
                    last, end = None, tar.offset
                    if not info.isfile() or info.issparse():
                        continue
                    extent = Extent(info.offset_data, info.size)
                    if extent.offset + extent.size > size:
                        skipped.append((info.name, "shard is cut inside this member"))
                        return
                    key, _, extension = info.name.rpartition(".")
                    last = _Member(key, extension.lower(), extent)
                    last.damaged = _is_damaged(file, last, end)
        except (tarfile.TarError, OSError, ValueError) as error:
            problem = f"shard cannot be read past byte {end}: {error}"
        block = os.pread(file.fileno(), _BLOCK, end)
        if last is not None:
            last.damaged |= _is_break(block) or (last.is_image and _is_no_image(file, last.extent))
            yield last
        problem = problem or _trailer_problem(file, end, block)  # tarfile ends without a word at a broken header
        if problem:
            skipped.append(("", problem))


def _is_damaged(file: BinaryIO, member: _Member, end: int) -> bool:
    """Whether a member's bytes may not be its own, by what lies from its start to the end of its last block.

    Of an image only what lies behind it is looked at here.
    """
    own = 0 if member.is_image else member.extent.size
    start = member.extent.offset + member.extent.size - own
    data = os.pread(file.fileno(), end - start, start)
    if data[own:].strip(b"\0"):
        return True
    return own > 0 and (_holds_header_anywhere(data) or (member.extension in _TEXTS and _ends_in_zeros(data[:own])))


def _is_break(block: bytes) -> bool:
    """Whether what lies behind a member is neither a header, a part of one at the end of the file, nor zeros."""
    if len(block) == _BLOCK and _is_header(block):
        return False
    return bool(block.strip(b"\0")) and (len(block) == _BLOCK or not b"ustar".startswith(block[_MAGIC : _MAGIC + 5]))


def _is_no_image(file: BinaryIO, extent: Extent) -> bool:
    """Whether the last image of a tar ends in zeros or in another tar, which need not begin on a block."""
    data = os.pread(file.fileno(), extent.size, extent.offset)
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"  # has no end mark, and may well end in a few zeros
    filled_up = not data[-_MANY_ZEROS:].strip(b"\0") if is_webp else _ends_in_zeros(data)
    return filled_up or _holds_header_anywhere(data)


def _trailer_problem(file: BinaryIO, end: int, block: bytes) -> str:
    """What is wrong behind the last member, of which `block` are the first bytes; empty where nothing is."""
    if len(block) < _BLOCK:
        return f"shard ends without its end-of-archive mark, at byte {end}"
    if block.strip(b"\0"):
        return f"shard is broken at byte {end}: neither a header nor its end-of-archive mark is there"
    file.seek(end)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            return "shard goes on behind its end-of-archive mark (tars joined?); that is not read"
    return ""


def index_shard(path: Path) -> ShardIndex:
    """Scan a tar's headers. What is incomplete, doubled, damaged or cut off is listed in `skipped`, never raised."""
    index = ShardIndex(path)
    seen: set[str] = set()
    for key, members in _group(_members(path, index.skipped)):
        extents = {extension: member.extent for extension, member in members.items()}
        image = next((extents[ext] for ext in IMAGE_EXTENSIONS if ext in extents), None)
        if key in seen:
            index.skipped.append((key, "key occurs twice in the shard"))
        elif any(member.damaged for member in members.values()):
            index.skipped.append((key, DAMAGED))
        elif image is None:
            index.skipped.append((key, "no image"))
        elif "txt" not in extents:
            index.skipped.append((key, "no caption"))
        else:
            index.entries.append(Entry(key, image, extents["txt"], extents.get("json")))
        seen.add(key)
    return index


def _group(members: Iterable[_Member]) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Join neighbours of one key into one sample; an extension that comes again starts a new sample."""
    current = ""
    group: dict[str, _Member] = {}
    for member in members:
        if member.key != current or member.extension in group:
            if group:
                yield current, group
            current, group = member.key, {}
        group[member.extension] = member
    if group:
        yield current, group
