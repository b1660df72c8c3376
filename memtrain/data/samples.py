"""Samples: decoded images with their captions, by position in the corpus."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from memtrain.data.buckets import RowBuckets, bucket_sizes
from memtrain.data.captions import Captions
from memtrain.data.excluded_keys import check_list, excluded_rows
from memtrain.data.images import BadSample, decode_crop
from memtrain.data.indexed import IndexedShards
from memtrain.data.kept import file_state
from memtrain.data.names import as_names, by_shard, places
from memtrain.data.open_shards import OpenShards
from memtrain.data.remote import ShardMissing
from memtrain.data.row_filter import filter_rows, parse_filter
from memtrain.data.rows import SampleRows
from memtrain.data.view import STRAIGHT, Seen, View

log = logging.getLogger(__name__)


class ShardSamples:
    """The samples of LAION-style shards, in shard order, decoded when asked for.

    Start-up looks at each shard's index alone (and writes it where it is missing); what stays in memory is a
    count per shard. Workers open shards as they need them.

    Its parts: `indexed`, the shards and their indexes; `rows`, which of their records are samples, by filter and
    list; buckets; captions. What is left to this class is to name samples and to read them.

    Args:
        shards: see `memtrain.data.sources.find_sources`.
        resolution: side of the decoded square, px.
        caption: `txt`, or a column of the json; of a list, one is drawn.
        where: a filter on the json's columns, see `memtrain.data.row_filter`.
        cache_dir: see `memtrain.data.indexed.cache_folder`; holds filters and buckets, too.
        cache_bytes: how much of it remote shards may take.
        missing_shards: `stop` the run where a shard cannot be had, or `skip` its samples.
        max_aspect_ratio, bucket_multiple: see `memtrain.data.buckets`; 1 decodes squares alone.
        workers: processes that write missing indexes.
        exclude_keys: a list of samples that are left out, see `memtrain.data.excluded_keys`.
        fetch: remote `shards` whole, or `samples` alone, see `memtrain.data.open_shards.OpenShards`.
    """

    def __init__(
        self,
        shards: str | Mapping | Sequence,
        resolution: int,
        caption: str = "txt",
        where: str | None = None,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 100_000_000_000,
        missing_shards: str = "stop",
        max_aspect_ratio: float = 1.0,
        bucket_multiple: int = 64,
        workers: int = 1,
        exclude_keys: str | Path | None = None,
        fetch: str = "shards",
    ):
        if missing_shards not in ("stop", "skip"):
            raise ValueError(f"data.missing_shards must be stop or skip, got {missing_shards}")
        self.resolution, self.caption, self.where = resolution, caption, where
        self.missing_shards = missing_shards
        self.sizes = bucket_sizes(resolution, max_aspect_ratio, bucket_multiple)  # (height, width), the square first
        # what a person wrote is checked first: the shards may take long to index
        clauses = parse_filter(where) if where else []
        listed = check_list(exclude_keys) if exclude_keys else 0

        self.indexed = IndexedShards(shards, cache_dir, cache_bytes, workers, fetch)
        self.shards = self.indexed.shards
        filtered = filter_rows(clauses, self.indexed)
        excluded: Mapping[int, np.ndarray] = {}
        self._excluded = ""
        if exclude_keys and listed:
            self._excluded = file_state(exclude_keys)
            excluded = excluded_rows(exclude_keys, self.indexed, filtered, where)
        self.rows = SampleRows([index.samples for index in self.indexed.indexes], filtered, excluded)
        self.counts = self.rows.counts
        if len(self) == 0:
            raise ValueError(self._why_empty(shards, exclude_keys))
        opened = (self.shards, self.indexed.indexes, self.indexed.remote, filtered.stems)
        self._open = OpenShards(*opened, in_ranges=fetch == "samples")
        self._buckets = RowBuckets(self.sizes, self.indexed, OpenShards(*opened), filtered, where)
        self._captions = Captions(caption)
        self._keys: dict[int, np.ndarray] = {}  # of one shard
        self._lost: set[int] = set()  # shards that could not be opened, where that is no reason to stop

    def _why_empty(self, shards: str | Mapping | Sequence, exclude_keys: str | Path | None) -> str:
        """What left no sample, and what to do."""
        if self.rows.excluded:
            return f"data.exclude_keys={exclude_keys} leaves no sample to train on; shorten it"
        if self.rows.filtered.dropped:
            return f"data.where={self.where} drops every sample"
        causes = Counter(why for _, why in self.skipped()).most_common(1)
        why = "no sample with an image and a caption in it" + (f" ({causes[0][0]})" if causes else "")
        return f"data.shards={shards}: {why}"

    def __len__(self) -> int:
        return len(self.rows)

    # ---- what is said of them

    def log_counts(self) -> None:
        """Say how many samples there are to train on, and what dropped the others."""
        log.info("%d samples in %d shards, %d skipped", len(self), len(self.shards), self.indexed.skipped_count)
        for text, count in self.rows.filtered.dropped.items():
            log.info("data.where drops %d samples: %s", count, text)

    def skipped(self) -> Iterator[tuple[str, str]]:
        """(name, why) of what no index can use."""
        return self.indexed.skipped()

    def described(self) -> dict[str, str | int | None]:
        """What decides a sample's centre square and its caption, beside the shards themselves."""
        return {"resolution": self.resolution, "crop": "center", "caption": self.caption, "where": self.where}

    @property
    def state(self) -> str:
        """Names which samples these are, in the present state of their shards."""
        return f"{self.indexed.state}\n{self.where}\n{self._excluded}"

    def buckets(self, number: int) -> np.ndarray:
        """Which of `sizes` each sample of a shard has. (counts[number],)"""
        return self.rows.without_excluded(number, self._buckets.of_shard(number))

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of the decoded sample, px."""
        return self._buckets.size(*self.rows.locate(index))

    # ---- names

    def key(self, index: int) -> str:
        """Shard path, relative to the shards' common folder, and `__key__`: who a sample is."""
        number, row = self.rows.locate(index)
        if number not in self._keys:  # the last shard's stay, for those who ask shard by shard
            self._keys = {number: self.indexed.indexes[number].records()["key"][self.rows.filtered.rows(number)]}
        return f"{self.shards[number].name}/{self._keys[number][row].decode('utf-8', 'surrogateescape')}"

    def find(self, names: Sequence[str]) -> np.ndarray:
        """Positions of the samples of these names (see `key`), in their order.

        Raises:
            ValueError: a name is not in the corpus.
        """
        found = self.look_up(names)
        missing = list(dict.fromkeys(name for name, position in zip(names, found, strict=True) if position < 0))
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(f"no sample {missing[0]}{more} in data.shards; was the list made from another corpus?")
        return found

    def look_up(self, names: Sequence[str] | pa.ChunkedArray) -> np.ndarray:
        """Positions of the samples of these names, in their order; -1 where the corpus has none. (n,) int64"""
        found = np.full(len(names), -1, dtype=np.int64)
        numbers = {shard.name: number for number, shard in enumerate(self.shards)}
        for home, which, wanted in by_shard(names if isinstance(names, pa.ChunkedArray) else as_names(names)):
            number = numbers.get(home)
            if number is not None:
                keys = self.indexed.indexes[number].records()["key"][self.rows.samples_of(number)]
                row = places(wanted, keys)
                found[which] = np.where(row >= 0, self.rows.starts[number] + row, -1)
        return found

    # ---- reading

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Fetch these shards in the background, where they are remote."""
        self._open.prefetch(numbers)

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Read the bytes of these samples at once, where they are read by ranges. Raises ShardMissing."""
        self._open.read_ahead([self.rows.locate(index) for index in indices])

    def get(self, index: int, view: View = STRAIGHT, size: tuple[int, int] | None = None) -> Seen:
        """A sample as a view of it shows it, in this (height, width), else as the square.

        Raises BadSample, and ShardMissing.
        """
        number, row = self.rows.locate(index)
        if number in self._lost:
            raise BadSample("shard is missing")
        try:
            shard = self._open[number]
            record = shard.record(row)
            data, caption = shard.read(record["image"]), self._captions.one(shard, record, view.caption)
        except ShardMissing:
            if self.missing_shards == "stop":
                raise
            self._lost.add(number)
            raise BadSample("shard is missing") from None
        image, sizes = decode_crop(data, *(size or self.sizes[0]), crop=view.crop, flip=view.flip)
        return Seen(image, caption, sizes)

    def members(self, index: int) -> tuple[bytes, bytes, bytes | None]:
        """Bytes of a sample's image, caption and json, as they lie in its shard. Raises BadSample, and ShardMissing."""
        number, row = self.rows.locate(index)
        shard = self._open[number]
        record = shard.record(row)
        return shard.read(record["image"]), shard.read(record["caption"]), shard.read_json(record)

    def captions(self, index: int) -> list[str]:
        """All captions of a sample, of which `get` draws one."""
        number, row = self.rows.locate(index)
        shard = self._open[number]
        return self._captions.all(shard, shard.record(row))

    def close(self) -> None:
        """Close the shards that are open; reading opens them again."""
        self._open.close()
        self._keys = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_keys": {}}
