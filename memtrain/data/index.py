"""Index files: where the samples of a shard lie, written once, mapped into memory when needed.

`00000.tar` gets `00000.tar.index.npy`, a record a sample, `00000.tar.index.json`, how many there are, what was
skipped and which state of the tar this is true of, and, where that was asked for, `00000.tar.index.hashes.npy`, the
hashes of their images. They lie beside the shard or in the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.progress import track

from memtrain.data.hashes import shard_hashes
from memtrain.data.remote import ShardCache, copy_url
from memtrain.data.shards import Extent, ShardIndex, index_shard

VERSION = 2  # raise it where the same tar gives another index
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
    extent = [("offset", "<i8"), ("size", "<i8")]
    width = max(map(len, keys), default=1)
    dtype = np.dtype([("key", f"S{width}"), ("image", extent), ("caption", extent), ("metadata", extent)])
    rows = [
        (key, *((part.offset, part.size) for part in (entry.image, entry.caption, entry.metadata or _NONE)))
        for key, entry in zip(keys, index.entries, strict=True)
    ]
    return np.array(rows, dtype=dtype)


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
    with written_aside(stem.with_name(stem.name + ".npy")) as file:
        np.save(file, records, allow_pickle=False)
    if hashed:
        with written_aside(stem.with_name(stem.name + ".hashes.npy")) as file:
            np.save(file, shard_hashes(shard, records["image"]), allow_pickle=False)
    said = {
        "version": VERSION,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "samples": len(index.entries),
        "skipped": index.skipped,
        "hashed": hashed,
    }
    with written_aside(stem.with_name(stem.name + ".json")) as file:  # last: it makes the index valid
        file.write(json.dumps(said).encode())
    return index


def open_index(shard: str | Path, cache: Path) -> IndexFile | None:
    """The valid index beside the shard or in `cache`; None where there is none. (Strings: 41,400 Paths are slow.)"""
    status = os.stat(shard)
    index = _load(f"{shard}.index")
    if index is None or not index.is_of(status):
        index = _load(_stem_in(cache, os.path.abspath(shard)))
    return index if index is not None and index.is_of(status) else None


def _load(stem: str) -> IndexFile | None:
    try:
        with open(f"{stem}.json", "rb") as file:
            said = json.loads(file.read())
        if said["version"] == VERSION:
            is_hashed = said.get("hashed", False) and os.path.exists(f"{stem}.hashes.npy")
            return IndexFile(stem, said["samples"], len(said["skipped"]), said["size"], said["mtime_ns"], is_hashed)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


def open_indexes(shards: Sequence[str], cache: Path, workers: int) -> list[IndexFile]:
    """The index of each shard on disk; missing and outdated ones are written to `cache` first, `workers` at a time."""
    found = [open_index(shard, cache) for shard in shards]
    missing = [
        (Path(shard), Path(_stem_in(cache, os.path.abspath(shard))))
        for shard, index in zip(shards, found, strict=True)
        if index is None
    ]
    if missing:
        (cache / "index").mkdir(parents=True, exist_ok=True)
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
                with written_aside(Path(stem + suffix)) as file:
                    copy_url(f"{url}.index{suffix}", Path(file.name))
            with contextlib.suppress(OSError), written_aside(Path(stem + ".hashes.npy")) as file:  # of older ones: none
                copy_url(f"{url}.index.hashes.npy", Path(file.name))
            index = _load(stem)
    if index is None:
        write_index(remote.fetch(url), Path(stem), hashed=True)
        index = _load(stem)
    return replace(index, mtime_ns=None)


def _stem_in(cache: Path, url: str) -> str:
    """Another one for every path or URL, readable all the same."""
    digest = hashlib.sha256(os.fsencode(url)).hexdigest()[:16]
    name = re.sub(r"[^\w.-]", "_", url.split("?")[0].rsplit("/", 1)[-1])[-80:]
    return f"{cache}/index/{digest}-{name}.index"


class written_aside:
    """A binary file that appears under its name when it is whole."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        self.file = tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=f".{self.path.name}-", delete=False)
        return self.file

    def __exit__(self, kind, error, traceback) -> None:
        self.file.close()
        if kind is None:
            os.chmod(self.file.name, 0o644)
            os.replace(self.file.name, self.path)
        else:
            os.unlink(self.file.name)
