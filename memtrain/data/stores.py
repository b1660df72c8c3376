"""Object stores through fsspec, `s3://`, `gs://` and `hf://`: whole files, ranges of their bytes, what a folder holds.

Who may read what, and at which address a store answers, is told by the environment and the files that each store's
own clients read (`AWS_ENDPOINT_URL`, `~/.aws/credentials`, `HF_TOKEN`, `FSSPEC_S3_ANON=true`, …): memtrain keeps no
secret. Ranges are read over https, too.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from memtrain.data.paths import scheme_of

STORES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}  # the package that fsspec takes for each
_EXTRAS = {"s3": "memtrain[s3]", "gs": "memtrain[gs]", "hf": "huggingface_hub"}
_RANGES = {**STORES, "http": "aiohttp", "https": "aiohttp"}
_REQUESTS = 32  # at once


class Range(NamedTuple):
    """Some bytes of a file behind a URL."""

    url: str
    start: int
    end: int


def is_store(url: str) -> bool:
    """Whether it lies in an object store that a package is installed for."""
    return _is_installed(url, STORES)


def has_ranges(url: str) -> bool:
    """Whether ranges of it can be read."""
    return _is_installed(url, _RANGES)


def _is_installed(url: str, packages: dict[str, str]) -> bool:
    package = packages.get(scheme_of(url))
    return package is not None and find_spec(package) is not None


def remedy(url: str) -> str:
    """What makes ranges of it readable, in words."""
    extra = _EXTRAS.get(scheme_of(url))
    return f"pip install '{extra}'" if extra else "they can be of s3://, gs://, hf:// and https:// alone"


def download(url: str, to: Path) -> None:
    """Copy a whole file to a path on disk, in parts at once where the store's client does so."""
    from fsspec.callbacks import Callback

    said = Callback()
    with _file_of(url) as (system, path):
        system.get_file(path, str(to), callback=said)
    if said.size is not None and to.stat().st_size != said.size:
        raise OSError(f"{to.stat().st_size} bytes came of {said.size}")


def upload(file: Path, url: str) -> None:
    """Copy a file on disk to a store, where it is there whole or not at all."""
    with _file_of(url) as (system, path):
        system.put_file(str(file), path)


def read_whole(url: str) -> bytes:
    """All bytes of a file."""
    with _file_of(url) as (system, path):
        return system.cat_file(path)


def size_of(url: str) -> int:
    """Bytes of a file, as the store says them now."""
    return state_of(url)[0]


def state_of(url: str) -> tuple[int, str]:
    """Bytes of a file, and what tells its states apart that are as long: its ETag, or when it was written."""
    with _file_of(url) as (system, path):
        info = system.info(path)
    if info["size"] is None:
        raise OSError("the server does not say how long it is")
    said = (info.get(name) for name in ("ETag", "etag", "blob_id", "LastModified", "mtime", "updated"))
    return int(info["size"]), str(next((value for value in said if value), ""))


def tars_in(url: str) -> list[str]:
    """The URLs of the .tar files in a folder of a store, sorted."""
    folder = url.rstrip("/")
    with _file_of(folder) as (system, path):
        found = system.ls(path, detail=False)
    return [f"{folder}/{name}" for name in sorted(map(posixpath.basename, found)) if name.endswith(".tar")]


def read_ranges(ranges: Sequence[Range]) -> list[bytes | OSError]:
    """The bytes of each range, many requests at once; in the place of one that cannot be had, why."""

    def read(wanted: Range) -> bytes | OSError:
        try:
            return _read_range(wanted)
        except OSError as error:
            return error

    if len(ranges) == 1:
        return [read(ranges[0])]
    with ThreadPoolExecutor(max(1, min(_REQUESTS, len(ranges)))) as pool:
        return list(pool.map(read, ranges))


def _read_range(wanted: Range) -> bytes:
    from fsspec.asyn import AsyncFileSystem

    with _file_of(wanted.url) as (system, path):
        if isinstance(system, AsyncFileSystem):
            data = system.cat_file(path, start=wanted.start, end=wanted.end)
        else:  # hf's would read far ahead
            with system.open(path, "rb", cache_type="none") as file:
                file.seek(wanted.start)
                data = file.read(wanted.end - wanted.start)
        if len(data) != wanted.end - wanted.start:
            raise OSError(f"{len(data)} bytes came where {wanted.end - wanted.start} were asked for")
        return data


@contextlib.contextmanager
def _file_of(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path in it. All that a client raises is an OSError then.

    A system is asked for at each use: fsspec keeps one for a process, and a forked worker must not have its parent's.
    """
    from fsspec.core import url_to_fs

    try:
        yield url_to_fs(url, use_listings_cache=False)
    except OSError:
        raise
    except Exception as error:  # clients have errors of their own: no credentials, no such address, timed out
        raise OSError(f"{type(error).__name__}: {error}") from error
