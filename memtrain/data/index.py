"""Index files: where the samples of a shard lie, written once, mapped into memory when needed.

`00000.tar` gets `00000.tar.index.npy`, a record a sample, `00000.tar.index.json`, how many there are, what was
skipped and which state of the tar this is true of, and, where that was asked for, `00000.tar.index.hashes.npy`, the
hashes of their images. They lie beside the shard or in the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path

import numpy as np
from rich.progress import track

from memtrain.core.files import written_aside
from memtrain.data import stores
from memtrain.data.distribute import Distributor, Done
from memtrain.data.hashes import read_hashes, shard_hashes
from memtrain.data.kept import DAMAGED, one_at_a_time, read_array, write_array
from memtrain.data.remote import ShardCache, copy_url, shown
from memtrain.data.shards import Extent, ShardIndex, index_shard
from memtrain.data.sources import LocalShard
from memtrain.data.staged import on_disk

log = logging.getLogger(__name__)

VERSION = 2  # raise it where the same tar gives another index
_EXTENT = np.dtype([("offset", "<i8"), ("size", "<i8")])
_EXTENTS = ("image", "caption", "metadata")
_NONE = Extent(0, -1)  # of a sample without a json member


@dataclass(frozen=True, slots=True)
class IndexFile:
    """A shard's index on disk; only what is here is in memory."""

    stem: str  # path without .npy and .json
    samples: int
    skipped_count: int
    size: int  # of the tar, bytes
    mtime_ns: int | None  # None of a remote shard: its time is that of the fetch
    is_hashed: bool = False  # hashes of the images lie beside it

    @property
    def hash_file(self) -> str | None:
        """(samples,) of `memtrain.data.hashes.HASHES`, where there is one."""
        return f"{self.stem}.hashes.npy" if self.is_hashed else None

    def records(self) -> np.ndarray:
        """(samples,) of the fields key, image, caption, metadata; the latter three (offset, size), size -1: none."""
        return np.load(f"{self.stem}.npy", mmap_mode="r", allow_pickle=False)

    def skipped(self) -> list[tuple[str, str]]:
        """(key, why) of what cannot be used."""
        said = json.loads(Path(f"{self.stem}.json").read_text(encoding="utf-8"))
        return [(key, why) for key, why in said["skipped"]]

    def is_of(self, status: os.stat_result) -> bool:
        """Whether a tar with this status is the one that was indexed."""
        return status.st_size == self.size and self.mtime_ns in (None, status.st_mtime_ns)


def as_records(index: ShardIndex) -> np.ndarray:
    """The entries as an array of fixed-size records. (samples,)"""
    keys = [entry.key.encode("utf-8", "surrogateescape") for entry in index.entries]
    dtype = _record_dtype(max(map(len, keys), default=1))
    rows = [
        (key, *((part.offset, part.size) for part in (entry.image, entry.caption, entry.metadata or _NONE)))
        for key, entry in zip(keys, index.entries, strict=True)
    ]
    return np.array(rows, dtype=dtype)


def _record_dtype(width: int) -> np.dtype:
    """The type of a record where the shard's longest key has `width` bytes."""
    return np.dtype([("key", f"S{width}"), *((name, _EXTENT) for name in _EXTENTS)])


def key_of(record: np.void) -> str:
    """The `__key__` of a record."""
    return bytes(record["key"]).decode("utf-8", "surrogateescape")


def write_index(shard: Path, stem: Path | None = None, hashed: bool = False) -> ShardIndex:
    """Scan a shard and write its index beside it, or as `stem`.npy and `stem`.json.

    `hashed`: with hashes of the images, as `stem`.hashes.npy.
    """
    status = os.stat(shard)  # before the scan: a tar that grows meanwhile makes the index outdated
    index = index_shard(shard)
    stem = stem or shard.with_name(f"{shard.name}.index")
    records = as_records(index)
    write_array(f"{stem}.npy", records)
    if hashed:
        write_array(f"{stem}.hashes.npy", shard_hashes(shard, records["image"]))
    said = {
        "version": VERSION,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "samples": len(index.entries),
        "skipped": index.skipped,
        "hashed": hashed,
    }
    with written_aside(stem.with_name(stem.name + ".json"), shared=True) as aside:  # last: it makes the index valid
        aside.write_text(json.dumps(said), encoding="utf-8")
    return index


def write_indexes(
    shards: Sequence[LocalShard], hashed: bool, distributor: Distributor
) -> Iterator[Done[tuple[int, int, bool]]]:
    """Write the index of each shard beside it, where none is that is true of it.

    Yields, as they come, how many samples each shard has and skips, and whether it was written now.
    """
    return distributor.run(partial(_write_counted, hashed=hashed), shards, name=attrgetter("name"))


def _write_counted(shard: LocalShard, hashed: bool) -> tuple[int, int, bool]:
    if (there := index_beside(shard, hashed)) is not None:
        return there.samples, there.skipped_count, False
    with on_disk(shard) as local:
        index = write_index(local.path, hashed=hashed)
        if shard.url:
            for suffix in (*([".hashes.npy"] if hashed else []), ".npy", ".json"):  # the last makes the others valid
                stores.upload(Path(f"{local.path}.index{suffix}"), f"{shard.url}.index{suffix}")
    return len(index.entries), len(index.skipped), True


def index_beside(shard: LocalShard, hashed: bool) -> IndexFile | None:
    """The index beside a shard, where it is true of it and has the hashes that are asked for; else None."""
    if shard.url:
        return _index_beside_stored(shard.url, hashed)
    index = _load(f"{shard.path}.index")
    if index is None or not index.is_of(shard.path.stat()) or (hashed and not index.is_hashed):
        return None
    return index


def _index_beside_stored(url: str, hashed: bool) -> IndexFile | None:
    """The same in a store, whose index is small and whose hashes are trusted to be what the index says."""
    with tempfile.TemporaryDirectory(prefix="memtrain-index-") as folder, contextlib.suppress(OSError):
        stem = f"{folder}/index"
        for suffix in (".json", ".npy"):
            stores.download(f"{url}.index{suffix}", Path(stem + suffix))
        index = _load(stem)
        says_hashed = json.loads(Path(f"{stem}.json").read_bytes()).get("hashed") is True if index else False
        if index is not None and index.size == stores.size_of(url) and (says_hashed or not hashed):
            return index
    return None


def open_index(shard: str | Path, cache: Path) -> IndexFile | None:
    """The valid index beside the shard or in `cache`; None where there is none. (Strings: 41,400 Paths are slow.)"""
    status = os.stat(shard)
    index = _load(f"{shard}.index")
    if index is None or not index.is_of(status):
        index = _load(_stem_in(cache, os.path.abspath(shard)))
    return index if index is not None and index.is_of(status) else None


def _load(stem: str) -> IndexFile | None:
    """The index of this stem; None where there is none that is whole."""
    try:
        with open(f"{stem}.json", "rb") as file:
            said = json.loads(file.read())
        if said["version"] != VERSION:
            return None
        samples, skipped, size, mtime_ns = said["samples"], said["skipped"], said["size"], said["mtime_ns"]
        counts = (samples, size, 0 if mtime_ns is None else mtime_ns)
        named = all(isinstance(text, str) for key, why in skipped for text in (key, why))
        if not named or not all(type(count) is int and count >= 0 for count in counts):
            return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if not _holds_records(f"{stem}.npy", samples):
        return None
    is_hashed = said.get("hashed") is True and read_hashes(f"{stem}.hashes.npy", samples) is not None
    return IndexFile(stem, samples, len(skipped), size, mtime_ns, is_hashed)


def _holds_records(path: str, count: int) -> bool:
    """Whether a .npy is an index of so many samples, as long as they take. Maps nothing: there may be 41,400."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else ((), False, None)
            width = 0 if dtype is None else dtype.itemsize - len(_EXTENTS) * _EXTENT.itemsize
            if shape != (count,) or width < 1 or dtype != _record_dtype(width):
                return False
            return os.fstat(file.fileno()).st_size == file.tell() + count * dtype.itemsize
    except DAMAGED:
        return False


def _lies_within(index: IndexFile) -> bool:
    """Whether all that the records name lies in a tar of the size that the index tells."""
    records = read_array(f"{index.stem}.npy")
    if records is None:
        return False
    for name in _EXTENTS:
        offset, size = records[name]["offset"], records[name]["size"]
        there = np.ones(len(records), np.bool_) if name != "metadata" else size != _NONE.size
        if not ((offset >= 0) & (size >= 0) & (offset <= index.size) & (size <= index.size - offset))[there].all():
            return False
    return True


def open_indexes(shards: Sequence[str], cache: Path, workers: int) -> list[IndexFile]:
    """The index of each shard on disk; missing and outdated ones are written to `cache` first, `workers` at a time."""
    found = [open_index(shard, cache) for shard in shards]
    missing = [
        (Path(shard), Path(_stem_in(cache, os.path.abspath(shard))))
        for shard, index in zip(shards, found, strict=True)
        if index is None
    ]
    if missing:
        with one_at_a_time(cache / "index", shards):
            missing = [(shard, stem) for shard, stem in missing if open_index(shard, cache) is None]
            if workers > 1 and len(missing) >= 4 * workers:
                with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                    list(_progress(pool.map(_write, missing, chunksize=4), len(missing)))
            else:
                for part in _progress(missing, len(missing)):
                    _write(part)
    return [index or _just_written(shard, cache) for shard, index in zip(shards, found, strict=True)]


def _progress(items: Iterable, total: int) -> Iterable:
    return track(items, "Indexing shards", total=total, disable=total < 20)


def _write(part: tuple[Path, Path]) -> None:
    write_index(*part)


def _just_written(shard: str, cache: Path) -> IndexFile:
    index = open_index(shard, cache)
    if index is None:
        raise ValueError(f"data.shards: {shard} changes while it is read; wait until it is finished")
    return index


def open_remote_indexes(urls: Sequence[str], cache: Path, remote: ShardCache) -> list[IndexFile]:
    """The index of each remote shard: from `cache`, else from the files beside it, else by fetching the shard once."""
    (cache / "index").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(8) as pool:
        return list(_progress(pool.map(lambda url: _open_remote_index(url, cache, remote), urls), len(urls)))


def _open_remote_index(url: str, cache: Path, remote: ShardCache) -> IndexFile:
    stem = _stem_in(cache, url)
    index = _load(stem)
    if index is None and not url.startswith("pipe:"):
        with contextlib.suppress(OSError):  # no index beside it: not worth a word
            for suffix in (".npy", ".json"):
                with written_aside(Path(stem + suffix), shared=True) as aside:
                    copy_url(f"{url}.index{suffix}", aside)
            with contextlib.suppress(OSError), written_aside(Path(stem + ".hashes.npy"), shared=True) as aside:
                copy_url(f"{url}.index.hashes.npy", aside)  # older ones have none
            index = _load(stem)
            if index is None or not _lies_within(index):
                index = None
                Path(stem + ".json").unlink(missing_ok=True)  # it would be taken for ours
                log.warning("the index beside %s is damaged: the shard is fetched, and indexed here", shown(url))
    if index is None:
        write_index(remote.fetch(url), Path(stem), hashed=True)
        index = _load(stem)
        if index is None:
            raise ValueError(f"the index of {shown(url)} cannot be read back from {stem}.json; is the disk whole?")
    return replace(index, mtime_ns=None)


def _stem_in(cache: Path, url: str) -> str:
    """The stem of a shard's index in the cache folder: another one for every path or URL, readable all the same."""
    digest = hashlib.sha256(os.fsencode(url)).hexdigest()[:16]
    name = re.sub(r"[^\w.-]", "_", url.split("?")[0].rsplit("/", 1)[-1])[-80:]
    return f"{cache}/index/{digest}-{name}.index"
