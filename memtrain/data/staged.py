"""Shards behind URLs for the commands that look at whole ones: a copy on disk for as long as it is looked at."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from memtrain.data import stores
from memtrain.data.remote import copy_url, one_line, shown
from memtrain.data.sources import LocalShard


@contextlib.contextmanager
def on_disk(shard: LocalShard) -> Iterator[LocalShard]:
    """The shard itself, or a copy of one behind a URL, with the statistics beside it, in the system's temporary folder.

    Raises:
        OSError: it cannot be had.
    """
    if not shard.url:
        yield shard
        return
    with tempfile.TemporaryDirectory(prefix="memtrain-shard-") as folder:
        local = LocalShard(Path(folder) / shard.path.name, shard.name)
        try:
            copy_url(shard.url, local.path)
        except OSError as error:
            raise OSError(error.errno or 0, one_line(error, shard.url), shown(shard.url)) from None
        if stores.is_store(shard.url):
            with contextlib.suppress(OSError):  # it has none
                stores.download(stats_beside(shard.url), Path(stats_beside(os.fspath(local.path))))
        yield local


def state_of(shard: LocalShard) -> list[int | str | None]:
    """What tells states of a shard apart: size and time of its tar and of the _stats.json beside it, as they are now.

    Of one in a store: size and version of the tar, for which the store is asked once.
    """
    if shard.url:
        try:
            return [*stores.state_of(shard.url)]
        except OSError:
            return [None, None]
    found: list[int | str | None] = []
    for path in (os.fspath(shard.path), stats_beside(os.fspath(shard.path))):
        try:
            status = os.stat(path)
            found += [status.st_size, status.st_mtime_ns]
        except OSError:
            found += [None, None]
    return found


def stats_beside(tar: str) -> str:
    """Where img2dataset leaves what it counted of a shard."""
    return tar.removesuffix(".tar") + "_stats.json"
