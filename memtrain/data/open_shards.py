"""Shards that a process reads from: fetched where they are remote, opened when needed, the last few kept open."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from memtrain.data import stores
from memtrain.data.columns import read_columns
from memtrain.data.images import BadSample
from memtrain.data.index import IndexFile, key_of
from memtrain.data.remote import ShardCache, ShardMissing, one_line, shown
from memtrain.data.sources import Shard

log = logging.getLogger(__name__)

_OPEN_SHARDS = 32  # a process holds so many tars and their indexes open
_CHANGED = "shard has changed since it was indexed"
_PUT_BACK = "put it back and resume, or use data.missing_shards=skip"
_TRIES, _BACKOFF_S = 3, 1.0  # for a shard that cannot be opened, and a range that cannot be read
_BETWEEN = 1 << 16  # bytes, at most, between the members of a sample that are read by one request
Span = tuple[int, int]  # from this byte of a tar up to that one


class LocalTar:
    """A tar on disk, open."""

    def __init__(self, path: Path):
        self.file = path.open("rb", buffering=0)
        self.close = weakref.finalize(self, self.file.close)  # at the latest when nobody has it any more
        self.status = os.fstat(self.file.fileno())
        self.size = self.status.st_size

    def is_of(self, index: IndexFile) -> bool:
        """Whether it is the tar that was indexed."""
        return index.is_of(self.status)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), size, offset)  # no shared position: safe after a fork


class StoredTar:
    """A tar behind a URL of which ranges are read; raises ShardMissing where one cannot be had in three tries."""

    def __init__(self, url: str):
        self.url = url
        self.size = stores.size_of(url)
        self._ahead: dict[Span, bytes] = {}  # of the samples that are asked for next

    def is_of(self, index: IndexFile) -> bool:
        """Whether it is as long as the tar that was indexed."""
        return self.size == index.size

    def ranges(self, spans: Sequence[Span]) -> list[stores.Range]:
        return [stores.Range(self.url, *span) for span in spans]

    def keep(self, found: Mapping[Span, bytes | OSError]) -> None:
        """Hold these bytes, and no others, for `read`."""
        self._ahead = {span: data for span, data in found.items() if not isinstance(data, OSError)}

    def read(self, offset: int, size: int) -> bytes:
        for (start, end), data in self._ahead.items():
            if start <= offset and offset + size <= end:
                return data[offset - start : offset - start + size]
        wanted, reason = stores.Range(self.url, offset, offset + size), ""
        for attempt in range(_TRIES):
            [found] = stores.read_ranges([wanted])
            if not isinstance(found, OSError):
                return found
            reason = one_line(found, self.url)
            log.warning("%s: bytes %d to %d cannot be read (%s), try %d of %d", shown(self.url), offset, offset + size,
                        reason, attempt + 1, _TRIES)  # fmt: skip
            time.sleep(_BACKOFF_S * 2**attempt if attempt + 1 < _TRIES else 0)
        raise ShardMissing(f"data.shards: {shown(self.url)} cannot be read any more ({reason}); {_PUT_BACK}")

    def close(self) -> None:
        self._ahead = {}


class OpenShard:
    """A shard's tar, its records, and which of them a filter chose."""

    def __init__(self, tar: LocalTar | StoredTar, index: IndexFile, chosen: str | None):
        self.tar, self.is_indexed = tar, tar.is_of(index)
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
        if min(offset, size) < 0 or size > self.tar.size - offset:
            raise BadSample("shard ends before what its index names" if self.is_indexed else _CHANGED)
        if not self.is_indexed:
            raise BadSample(_CHANGED)
        data = self.tar.read(offset, size)
        if len(data) < size:
            raise BadSample(_CHANGED)
        return data

    def read_json(self, record: np.void) -> bytes | None:
        return self.read(record["metadata"]) if record["metadata"]["size"] >= 0 else None

    def span(self, record: np.void) -> Span | None:
        """From where to where all members of a sample lie; None where they lie far apart, or not in the tar."""
        extents = [record[name] for name in ("image", "caption", "metadata") if record[name]["size"] >= 0]
        parts = [(int(extent["offset"]), int(extent["size"])) for extent in extents]
        start, end = min(offset for offset, _ in parts), max(offset + size for offset, size in parts)
        is_near = end - start - sum(size for _, size in parts) <= _BETWEEN
        return (start, end) if is_near and start >= 0 and end <= self.tar.size else None


class OpenShards:
    """The shards of a corpus by their number.

    Args:
        shards, indexes: of the corpus, in its order.
        remote: fetches and keeps those that are not on disk.
        chosen: STEM of each shard's rows in STEM.npy, which a filter chose; None: all its records.
        in_ranges: read samples of remote shards each by its range of bytes; nothing is fetched whole, or kept.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        indexes: Sequence[IndexFile],
        remote: ShardCache,
        chosen: Sequence[str] | None = None,
        in_ranges: bool = False,
    ):
        self.shards, self.indexes, self.remote = shards, indexes, remote
        self.in_ranges = in_ranges
        self._chosen = chosen
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def path(self, number: int) -> Path:
        """Where a shard lies on disk; fetched first where it is remote."""
        shard = self.shards[number]
        return self.remote.fetch(shard.url) if shard.is_remote else Path(shard.url)

    def columns(self, number: int, names: Sequence[str]) -> pa.Table:
        """These columns of a shard's rows."""
        url, records = self.shards[number].url, self.indexes[number].records()
        rows = None if self._chosen is None else np.load(f"{self._chosen[number]}.npy")
        keys = [key_of(record) for record in (records if rows is None else records[rows])]
        beside: Path | bytes | None = Path(url).with_suffix(".parquet")
        if self.shards[number].is_remote:
            beside = parquet_beside(url)
        return read_columns(beside, keys, names, lambda row: self[number].read_json(self[number].record(row)))

    def read_ahead(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Read these (shard, row) at once, where that takes requests; what cannot be had is asked for again by `read`.

        Raises ShardMissing.
        """
        if not self.in_ranges:
            return
        tars: dict[int, StoredTar] = {}
        spans: dict[int, list[Span]] = {}
        for number, row in wanted:
            shard = self[number]
            span = shard.span(shard.record(row))
            if isinstance(shard.tar, StoredTar) and span is not None:
                tars[number] = shard.tar
                spans.setdefault(number, []).append(span)
        found = iter(stores.read_ranges([part for number, tar in tars.items() for part in tar.ranges(spans[number])]))
        for number, tar in tars.items():
            tar.keep({span: next(found) for span in spans[number]})

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Fetch these shards in the background, where they are remote and fetched whole."""
        if self.in_ranges:
            return
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

    def _tar(self, number: int) -> LocalTar | StoredTar:
        shard = self.shards[number]
        return StoredTar(shard.url) if self.in_ranges and shard.is_remote else LocalTar(self.path(number))

    def _try_to_open(self, number: int) -> OpenShard:
        chosen = None if self._chosen is None else self._chosen[number]
        name, reason = self.shards[number].name, ""
        for attempt in range(_TRIES):
            try:
                return OpenShard(self._tar(number), self.indexes[number], chosen)
            except ShardMissing:
                raise  # it has had its tries
            except OSError as error:
                reason = error.strerror or one_line(error, self.shards[number].url)
                log.warning("%s cannot be opened (%s), try %d of %d", name, reason, attempt + 1, _TRIES)
                time.sleep(_BACKOFF_S * 2**attempt if attempt + 1 < _TRIES else 0)
        raise ShardMissing(f"data.shards: {name} cannot be opened any more ({reason}); {_PUT_BACK}")

    def close(self) -> None:
        """Close all shards; one that is asked for again is opened again."""
        for shard in self._open.values():
            shard.tar.close()
        self._open.clear()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors stay where they are


def parquet_beside(url: str) -> bytes | None:
    """The parquet beside a shard in a store; None where there is none."""
    if not stores.is_store(url):
        return None
    with contextlib.suppress(OSError):  # none is not worth a word: the jsons tell the same
        return stores.read_whole(url.removesuffix(".tar") + ".parquet")
    return None
