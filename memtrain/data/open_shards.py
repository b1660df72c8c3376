"""Shards that a process reads from: fetched where they are remote, opened when needed, the last few kept open."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from memtrain.data.columns import read_columns
from memtrain.data.images import BadSample
from memtrain.data.index import IndexFile, key_of
from memtrain.data.remote import ShardCache, ShardMissing
from memtrain.data.sources import Shard

log = logging.getLogger(__name__)

_OPEN_SHARDS = 32  # a process holds so many tars and their indexes open
_CHANGED = "shard has changed since it was indexed"
_TRIES, _BACKOFF_S = 3, 1.0  # for a shard on disk that cannot be opened


class OpenShard:
    """A shard's file, its records, and which of them a filter chose."""

    def __init__(self, path: Path, index: IndexFile, chosen: str | None):
        self.file = path.open("rb", buffering=0)
        self.close = weakref.finalize(self, self.file.close)  # at the latest when nobody has it any more
        status = os.fstat(self.file.fileno())
        self.size, self.is_indexed = status.st_size, index.is_of(status)
        self.records = index.records()
        self.rows = None if chosen is None else np.load(f"{chosen}.npy", mmap_mode="r")

    def __len__(self) -> int:
        """How many rows it has."""
        return len(self.records if self.rows is None else self.rows)

    def record(self, row: int) -> np.void:
        """The index's record of a row, see `memtrain.data.index.IndexFile.records`."""
        return self.records[row if self.rows is None else self.rows[row]]

    def read(self, extent: np.void) -> bytes:
        """A member's bytes. Raises BadSample where the tar is not the one that was indexed."""
        offset, size = int(extent["offset"]), int(extent["size"])
        if min(offset, size) < 0 or size > self.size - offset:
            raise BadSample("shard ends before what its index names" if self.is_indexed else _CHANGED)
        data = os.pread(self.file.fileno(), size, offset)  # no shared position: safe after a fork
        if not self.is_indexed or len(data) < size:
            raise BadSample(_CHANGED)
        return data

    def read_json(self, record: np.void) -> bytes | None:
        return self.read(record["metadata"]) if record["metadata"]["size"] >= 0 else None


class OpenShards:
    """The shards of a corpus by their number.

    Args:
        shards, indexes: of the corpus, in its order.
        remote: fetches and keeps those that are not on disk.
        chosen: STEM of each shard's rows in STEM.npy, which a filter chose; None: all its records.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        indexes: Sequence[IndexFile],
        remote: ShardCache,
        chosen: Sequence[str] | None = None,
    ):
        self.shards, self.indexes, self.remote = shards, indexes, remote
        self._chosen = chosen
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def path(self, number: int) -> Path:
        """Where a shard lies on disk; fetched first where it is remote."""
        shard = self.shards[number]
        return self.remote.fetch(shard.url) if shard.is_remote else Path(shard.url)

    def columns(self, number: int, names: Sequence[str]) -> pa.Table:
        """These columns of a shard's rows."""
        shard = self[number]
        keys = [key_of(shard.record(row)) for row in range(len(shard))]
        return read_columns(self.path(number), keys, names, lambda row: shard.read_json(shard.record(row)))

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Fetch these shards in the background, where they are remote."""
        urls = [self.shards[number].url for number in numbers if self.shards[number].is_remote]
        if urls:
            self.remote.prefetch(urls)

    def __getitem__(self, number: int) -> OpenShard:
        """The shard of this number, open. Raises ShardMissing after three tries."""
        if number not in self._open:
            while len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[number] = self._try_to_open(number)
        self._open.move_to_end(number)
        return self._open[number]

    def _try_to_open(self, number: int) -> OpenShard:
        chosen = None if self._chosen is None else self._chosen[number]
        name, reason = self.shards[number].name, ""
        for attempt in range(_TRIES):
            try:
                return OpenShard(self.path(number), self.indexes[number], chosen)
            except ShardMissing:
                raise  # it has had its tries
            except OSError as error:
                reason = error.strerror or str(error)
                log.warning("%s cannot be opened (%s), try %d of %d", name, reason, attempt + 1, _TRIES)
                time.sleep(_BACKOFF_S * 2**attempt if attempt + 1 < _TRIES else 0)
        raise ShardMissing(
            f"data.shards: {name} cannot be opened any more ({reason}); put it back and resume, "
            "or use data.missing_shards=skip"
        )

    def close(self) -> None:
        """Close all shards; one that is asked for again is opened again."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors stay where they are
