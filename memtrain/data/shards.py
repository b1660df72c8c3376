"""Find the shards of a corpus and index them: which samples a tar holds, and where their bytes lie.

A shard is scanned once, header by header; samples are then read by offset, so an image can only ever meet
the caption that lies under its own key in its own shard.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memtrain.data.paths import expand

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


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


def _members(path: Path, skipped: list[tuple[str, str]]) -> Iterator[tuple[str, str, Extent]]:
    """(key, lower-case extension, extent) of every whole regular file in a tar, in file order."""
    size = path.stat().st_size
    if size == 0:
        skipped.append(("", "shard is empty"))
        return
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                extent = Extent(member.offset_data, member.size)
                end = extent.offset + -(-extent.size // 512) * 512
                if not member.isfile():
                    continue
                if extent.offset + extent.size > size:
                    skipped.append((member.name, "shard is cut inside this member"))
                    return
                key, _, extension = member.name.rpartition(".")
                yield key, extension.lower(), extent
    except (tarfile.TarError, OSError, ValueError) as error:
        skipped.append(("", f"shard cannot be read past byte {end}: {error}"))
        return
    with path.open("rb") as file:  # tarfile ends without a word where a header is cut off or damaged
        file.seek(end)
        trailer = file.read(512)
        if len(trailer) < 512 or trailer.strip(b"\0"):
            skipped.append(("", f"shard ends without its end-of-archive mark, at byte {end}"))
            return
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                skipped.append(("", "shard goes on behind its end-of-archive mark (tars joined?); that is not read"))
                return


def index_shard(path: Path) -> ShardIndex:
    """Scan a tar's headers. What is incomplete, doubled or cut off is listed in `skipped`, never raised."""
    index = ShardIndex(path)
    seen: set[str] = set()
    for key, members in _group(_members(path, index.skipped)):
        image = next((members[ext] for ext in IMAGE_EXTENSIONS if ext in members), None)
        if key in seen:
            index.skipped.append((key, "key occurs twice in the shard"))
        elif image is None:
            index.skipped.append((key, "no image"))
        elif "txt" not in members:
            index.skipped.append((key, "no caption"))
        else:
            index.entries.append(Entry(key, image, members["txt"], members.get("json")))
        seen.add(key)
    return index


def _group(members: Iterable[tuple[str, str, Extent]]) -> Iterator[tuple[str, dict[str, Extent]]]:
    """Join neighbours of one key into one sample; an extension that comes again starts a new sample."""
    current: str | None = None
    group: dict[str, Extent] = {}
    for key, extension, extent in members:
        if key != current or extension in group:
            if group:
                yield current, group
            current, group = key, {}
        group[extension] = extent
    if group:
        yield current, group
