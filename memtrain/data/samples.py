"""Samples: decoded images with their captions, by position in the corpus."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.progress import track

from memtrain.data.buckets import bucket_sizes, nearest_bucket
from memtrain.data.columns import Clause, apply_filter, parse_filter, parse_json, read_columns, read_keys
from memtrain.data.derived import kept_buckets, kept_filters
from memtrain.data.escaping import as_text
from memtrain.data.images import BadSample, decode_image, picture_shape
from memtrain.data.index import VERSION, IndexFile, key_of, open_indexes, open_remote_indexes
from memtrain.data.open_shards import OpenShard, OpenShards
from memtrain.data.remote import ShardCache, ShardMissing
from memtrain.data.sources import Shard, find_sources

log = logging.getLogger(__name__)


def cache_folder(cache_dir: str | Path | None) -> Path:
    """The folder that is named, else $MEMTRAIN_CACHE, else ~/.cache/memtrain."""
    return Path(cache_dir or os.environ.get("MEMTRAIN_CACHE") or "~/.cache/memtrain").expanduser()


@dataclass(frozen=True)
class View:
    """How a sample is looked at. All of it is drawn by the caller; the default looks straight at the middle."""

    crop: tuple[float, float] = (0.5, 0.5)  # where the crop lies, top to bottom and left to right, in [0, 1]
    flip: bool = False
    caption: float = 0.0  # which of several captions, in [0, 1)


STRAIGHT = View()


class ShardSamples:
    """The samples of LAION-style shards, in shard order, decoded when asked for.

    Start-up looks at each shard's index alone (and writes it where it is missing); what stays in memory is a
    count per shard. Workers open shards as they need them.

    Args:
        shards: see `memtrain.data.sources.find_sources`.
        resolution: side of the decoded square, px.
        max_aspect_ratio, bucket_multiple: see `memtrain.data.buckets`; 1 decodes squares alone.
        caption: `txt`, or a column of the json; of a list, one is drawn.
        where: a filter on the json's columns, see `memtrain.data.columns`.
        cache_dir: see `cache_folder`; holds indexes that do not lie beside their shard, filters and remote shards.
        cache_bytes: how much of it remote shards may take.
        missing_shards: `stop` the run where a shard cannot be had, or `skip` its samples.
        workers: processes that write missing indexes.
        exclude_keys: a list of samples that are left out, see `memtrain.data.columns.read_keys`.
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
    ):
        if missing_shards not in ("stop", "skip"):
            raise ValueError(f"data.missing_shards must be stop or skip, got {missing_shards}")
        self.resolution, self.caption, self.where = resolution, caption, where
        self.missing_shards = missing_shards
        self.sizes = bucket_sizes(resolution, max_aspect_ratio, bucket_multiple)  # (height, width), the square first
        clauses = parse_filter(where) if where else []
        listed = read_keys(exclude_keys) if exclude_keys else frozenset()
        self.cache_dir = cache_folder(cache_dir)
        self.remote = ShardCache(self.cache_dir / "shards", cache_bytes)
        self.shards: list[Shard] = find_sources(shards)
        self._keys: dict[int, np.ndarray] = {}  # of one shard
        self._lost: set[int] = set()  # shards that could not be opened, where that is no reason to stop
        self.indexes = self._open_indexes(workers)
        self._open = OpenShards(self.shards, self.indexes, self.remote)
        self.counts = np.array([index.samples for index in self.indexes], dtype=np.int64)
        self.ends = self.counts.cumsum()
        self.dropped: Counter[str] = Counter()  # samples that each condition of the filter drops
        if clauses:
            self._apply_filter(clauses)
        self._buckets: list[str] | None = self._assign_buckets(where) if len(self.sizes) > 1 else None
        self._excluded: dict[int, np.ndarray] = {}  # shard -> rows of it that a list leaves out, sorted
        if listed:
            self._exclude(listed, exclude_keys)
        if len(self) == 0:
            if self._excluded:
                raise ValueError(f"data.exclude_keys={exclude_keys} leaves no sample to train on; shorten it")
            causes = Counter(why for _, why in self.skipped()).most_common(1)
            why = "no sample with an image and a caption in it" + (f" ({causes[0][0]})" if causes else "")
            raise ValueError(
                f"data.where={where} drops every sample" if self.dropped else f"data.shards={shards}: {why}"
            )

    def log_counts(self) -> None:
        """Say how many samples there are to train on, and what dropped the others."""
        log.info("%d samples in %d shards, %d skipped", len(self), len(self.shards), self.skipped_count)
        for text, count in self.dropped.items():
            log.info("data.where drops %d samples: %s", count, text)

    # ---- start-up

    def _open_indexes(self, workers: int) -> list[IndexFile]:
        local = [shard.url for shard in self.shards if not shard.is_remote]
        remote = [shard.url for shard in self.shards if shard.is_remote]
        found = dict(zip(local, open_indexes(local, self.cache_dir, workers), strict=True))
        if remote:
            found.update(zip(remote, open_remote_indexes(remote, self.cache_dir, self.remote), strict=True))
        return [found[shard.url] for shard in self.shards]

    def _columns(self, number: int, names: Sequence[str]) -> pa.Table:
        """These columns, of the samples of a shard that the filter chose."""
        shard = self._open[number]
        keys = [key_of(shard.record(row)) for row in range(self.counts[number])]
        return read_columns(self._open.path(number), keys, names, lambda row: shard.read_json(shard.record(row)))

    def _apply_filter(self, clauses: Sequence[Clause]) -> None:
        """Choose each shard's rows, or find them chosen before in the cache folder."""
        columns = list(dict.fromkeys(column for clause in clauses for column in clause.columns))
        stems = self._kept("where", " and ".join(clause.text for clause in clauses))
        filtered = kept_filters(stems, self.counts, lambda n: apply_filter(clauses, self._columns(n, columns)))
        for number, (left, dropped) in enumerate(filtered):
            self.dropped.update(dropped)
            self.counts[number] = left
        self.ends = self.counts.cumsum()
        self._open.choose(stems)

    def _exclude(self, listed: frozenset[str], path: str | Path) -> None:
        """Leave these samples out. Rows keep their numbers, so what was cached of a shard stays true."""
        homes = {_home(name) for name in listed}
        unknown = set(listed)
        numbers = [number for number, shard in enumerate(self.shards) if shard.name in homes]
        for number in track(numbers, "Excluding samples", disable=len(numbers) < 20):
            keys = self.indexes[number].records()["key"].tolist()
            shard = self.shards[number].name
            names = [as_text(f"{shard}/{key.decode('utf-8', 'surrogateescape')}") for key in keys]
            unknown.difference_update(names)
            is_listed = np.array([name in listed for name in names], dtype=bool)
            self._excluded[number] = np.flatnonzero(is_listed[self._open.chosen(number)])
            self.counts[number] -= len(self._excluded[number])
        self.ends = self.counts.cumsum()
        if len(unknown) == len(listed):
            raise ValueError(
                f"data.exclude_keys={path}: none of its {len(listed)} keys, such as {min(unknown)}, is in "
                "data.shards; was the list made from another corpus?"
            )
        log.info("data.exclude_keys drops %d samples: %s", sum(map(len, self._excluded.values())), path)
        if unknown:
            log.warning(
                "data.exclude_keys: %d of its %d keys are not in data.shards, such as %s",
                len(unknown), len(listed), min(unknown),
            )  # fmt: skip

    def _assign_buckets(self, where: str | None) -> list[str]:
        """Files with each shard's buckets, from the columns width and height, else from the pictures' headers."""
        stems = self._kept("buckets", f"{where} {self.sizes}")
        kept_buckets(files := [f"{stem}.npy" for stem in stems], self.counts, self._sort_into_buckets)
        return files

    def _sort_into_buckets(self, number: int) -> np.ndarray:
        shard, table = self._open[number], self._columns(number, ("height", "width"))
        shapes = list(zip(*(table[name].to_pylist() for name in ("height", "width")), strict=True))
        shapes = [
            shape if all(isinstance(side, (int, float)) and side > 0 for side in shape)
            else picture_shape(shard.read(shard.record(row)["image"]))
            for row, shape in enumerate(shapes)
        ]  # fmt: skip
        heights, widths = np.array(shapes, dtype=np.float64).reshape(-1, 2).T
        return nearest_bucket(heights, widths, self.sizes)

    def buckets(self, number: int) -> np.ndarray:
        """Which of `sizes` each sample of a shard has. (counts[number],)"""
        buckets = np.load(self._buckets[number], mmap_mode="r")
        return np.delete(buckets, self._excluded[number]) if number in self._excluded else buckets

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of the decoded sample, px."""
        number, row = self.locate(index)
        return self.sizes[0 if self._buckets is None else np.load(self._buckets[number], mmap_mode="r")[row]]

    def identity(self, number: int, of: str) -> str:
        """Names what was derived from a shard in its present state."""
        index = self.indexes[number]
        said = f"{self.shards[number].url}\n{index.size} {index.mtime_ns} {VERSION}\n{of}"
        return hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()[:32]

    def _kept(self, folder: str, of: str) -> list[str]:
        """Where to keep what is derived from each shard's columns, which a parquet beside it may hold."""
        stems = []
        for number, shard in enumerate(self.shards):
            try:
                status = os.stat(Path(shard.url).with_suffix(".parquet"))
                of_state = f"{of}\n{status.st_size} {status.st_mtime_ns}"
            except (OSError, ValueError):  # none, as beside remote shards
                of_state = of
            stems.append(str(self.cache_dir / folder / self.identity(number, of_state)))
        return stems

    def chosen_digest(self, number: int) -> str | None:
        """Tells which samples of a shard the filter chose; None where there is no filter."""
        chosen = self._open.chosen(number)
        return None if isinstance(chosen, slice) else hashlib.sha256(chosen.tobytes()).hexdigest()[:16]

    def described(self) -> dict[str, str | int | None]:
        """What decides a sample's centre square and its caption, beside the shards themselves."""
        return {"resolution": self.resolution, "crop": "center", "caption": self.caption, "where": self.where}

    def skipped(self) -> Iterator[tuple[str, str]]:
        """(name, why) of what no index can use, read from the index files."""
        for shard, index in zip(self.shards, self.indexes, strict=True):
            if index.skipped_count:
                yield from ((f"{shard.name}/{key}", why) for key, why in index.skipped())

    @property
    def skipped_count(self) -> int:
        return sum(index.skipped_count for index in self.indexes)

    # ---- reading

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Shard, and row among those of it that the filter chose, of a position in the corpus."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self.ends, index, side="right"))
        row = int(index - (self.ends[shard] - self.counts[shard]))
        if shard in self._excluded:
            excluded = self._excluded[shard]  # row i of them has excluded[i] - i that stay before it
            row += int(np.searchsorted(excluded - np.arange(len(excluded)), row, side="right"))
        return shard, row

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Fetch these shards in the background, where they are remote."""
        self._open.prefetch(numbers)

    def key(self, index: int) -> str:
        """Shard path, relative to the shards' common folder, and `__key__`: who a sample is."""
        number, row = self.locate(index)
        if number not in self._keys:  # the last shard's stay, for those who ask shard by shard
            self._keys = {number: self.indexes[number].records()["key"][self._open.chosen(number)]}
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

    def look_up(self, names: Sequence[str]) -> np.ndarray:
        """Positions of the samples of these names, in their order; -1 where the corpus has none. (n,) int64"""
        starts = self.ends - self.counts
        wanted: dict[str, int] = dict.fromkeys(names, -1)
        homes = {_home(name) for name in wanted}
        for number, shard in enumerate(self.shards):
            if shard.name in homes:
                records = self.indexes[number].records()
                for row, record in enumerate(self._rows(number)):
                    name = f"{shard.name}/{key_of(records[record])}"
                    if name in wanted:
                        wanted[name] = int(starts[number]) + row
        return np.array([wanted[name] for name in names], dtype=np.int64)

    def _rows(self, number: int) -> np.ndarray:
        """Which of a shard's records are samples of this corpus, in order. (counts[number],)"""
        rows = np.arange(self.indexes[number].samples)[self._open.chosen(number)]
        return np.delete(rows, self._excluded.get(number, []))

    def positions_of(self, records: np.ndarray) -> np.ndarray:
        """Positions of records, sorted and numbered shard by shard; -1 where filter or list drops one. (n,)"""
        sizes = np.array([index.samples for index in self.indexes], dtype=np.int64)
        starts = sizes.cumsum() - sizes
        bounds = np.searchsorted(records, np.append(starts, sizes.sum()))
        found = np.full(len(records), -1, dtype=np.int64)
        for number in np.flatnonzero(np.diff(bounds)):
            mine = slice(bounds[number], bounds[number + 1])
            place = np.full(sizes[number], -1, dtype=np.int64)
            place[self._rows(number)] = np.arange(self.ends[number] - self.counts[number], self.ends[number])
            found[mine] = place[records[mine] - starts[number]]
        return found

    def get(self, index: int, view: View = STRAIGHT, size: tuple[int, int] | None = None) -> tuple[np.ndarray, str]:
        """Image (3, height, width) uint8 of this size, else of the square, and caption.

        Raises BadSample, and ShardMissing.
        """
        number, row = self.locate(index)
        if number in self._lost:
            raise BadSample("shard is missing")
        try:
            shard = self._open[number]
        except ShardMissing:
            if self.missing_shards == "stop":
                raise
            self._lost.add(number)
            raise BadSample("shard is missing") from None
        record = shard.record(row)
        image = decode_image(shard.read(record["image"]), *(size or self.sizes[0]), crop=view.crop, flip=view.flip)
        return image, self._caption(shard, record, view)

    def captions(self, index: int) -> list[str]:
        """All captions of a sample, of which `get` draws one."""
        number, row = self.locate(index)
        shard = self._open[number]
        return self._captions(shard, shard.record(row))

    def _caption(self, shard: OpenShard, record: np.void, view: View) -> str:
        texts = self._captions(shard, record)
        return texts[int(view.caption * len(texts))] if texts else ""

    def _captions(self, shard: OpenShard, record: np.void) -> list[str]:
        if self.caption == "txt":
            return [shard.read(record["caption"]).decode("utf-8", errors="replace").strip()]
        found = parse_json(shard.read_json(record)).get(self.caption)
        many = found if isinstance(found, list) else [found]
        return [text.strip() for text in many if isinstance(text, str)]

    def close(self) -> None:
        """Close the shards that are open; reading opens them again."""
        self._open.close()
        self._keys = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_keys": {}}


def _home(name: str) -> str:
    """The shard of a sample of this name."""
    return name.rsplit(".tar/", 1)[0] + ".tar"
