"""The shards of a corpus with their indexes: all that start-up knows of a corpus, a few numbers a shard."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from memtrain.data.index import VERSION, IndexFile, open_indexes, open_remote_indexes
from memtrain.data.remote import ShardCache
from memtrain.data.sources import Shard, check_fetch, find_sources


def cache_folder(cache_dir: str | Path | None) -> Path:
    """The folder that is named, else $MEMTRAIN_CACHE, else ~/.cache/memtrain."""
    return Path(cache_dir or os.environ.get("MEMTRAIN_CACHE") or "~/.cache/memtrain").expanduser()


class IndexedShards:
    """The tars of a corpus, in order, each with its index; where one is missing it is written first.

    Args:
        spec: see `memtrain.data.sources.find_sources`.
        cache_dir: see `cache_folder`; holds indexes that do not lie beside their shard, and remote shards.
        cache_bytes: how much of it remote shards may take.
        workers: processes that write missing indexes.
        fetch: how remote shards are read afterwards, see `memtrain.data.sources.check_fetch`.
    """

    def __init__(
        self,
        spec: str | Mapping | Sequence,
        cache_dir: str | Path | None,
        cache_bytes: int,
        workers: int,
        fetch: str = "shards",
    ):
        self.cache_dir = cache_folder(cache_dir)
        self.remote = ShardCache(self.cache_dir / "shards", cache_bytes)
        self.shards: list[Shard] = find_sources(spec)
        check_fetch(fetch, self.shards)
        local = [shard.url for shard in self.shards if not shard.is_remote]
        remote = [shard.url for shard in self.shards if shard.is_remote]
        found = dict(zip(local, open_indexes(local, self.cache_dir, workers), strict=True))
        if remote:
            found.update(zip(remote, open_remote_indexes(remote, self.cache_dir, self.remote), strict=True))
        self.indexes: list[IndexFile] = [found[shard.url] for shard in self.shards]

    def identity(self, number: int, of: str) -> str:
        """Names what was derived from a shard in its present state."""
        index = self.indexes[number]
        said = f"{self.shards[number].url}\n{index.size} {index.mtime_ns} {VERSION}\n{of}"
        return hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()[:32]

    @cached_property
    def state(self) -> str:
        """Names the shards in their present states, all of them."""
        pairs = zip(self.shards, self.indexes, strict=True)
        said = (f"{shard.url} {index.size} {index.mtime_ns}" for shard, index in pairs)
        return hashlib.sha256("\n".join([str(VERSION), *said]).encode(errors="surrogateescape")).hexdigest()

    def derived(self, folder: str, of: str) -> list[str]:
        """Where to keep what is derived from each shard's columns, which a parquet beside it may hold; no suffix."""
        stems = []
        for number, shard in enumerate(self.shards):
            try:
                status = os.stat(Path(shard.url).with_suffix(".parquet"))
                of_state = f"{of}\n{status.st_size} {status.st_mtime_ns}"
            except (OSError, ValueError):  # none, as beside remote shards
                of_state = of
            stems.append(str(self.cache_dir / folder / self.identity(number, of_state)))
        return stems

    def skipped(self) -> Iterator[tuple[str, str]]:
        """(name, why) of what no index can use, read from the index files."""
        for shard, index in zip(self.shards, self.indexes, strict=True):
            if index.skipped_count:
                yield from ((f"{shard.name}/{key}", why) for key, why in index.skipped())

    @property
    def skipped_count(self) -> int:
        return sum(index.skipped_count for index in self.indexes)
