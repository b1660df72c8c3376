"""In which order samples are seen.

The sequence of global batches is a function of (seed, corpus, global batch size); a rank takes its slice.
Positions count the corpus shard by shard, so nothing here grows with the samples: only a count per shard is
kept, and the rows of a few shards at a time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memtrain.core.streams import Stream
from memtrain.data.groups import Counts, Groups
from memtrain.data.groups import stream_generator as _generator
from memtrain.data.limited import Keep, LimitedGroups, as_made, limited_groups
from memtrain.data.pictures import among


@dataclass(frozen=True)
class Window:
    """Some shards of an epoch whose samples are permuted together."""

    epoch: int
    number: int
    shards: tuple[int, ...]  # a shard of weight 2 comes twice an epoch
    parts: tuple[int, ...]  # rows taken of each
    canaries: np.ndarray  # positions of the canaries that are planted here
    limited: np.ndarray  # positions of the members of limited groups whose turn it is

    def __len__(self) -> int:
        return sum(self.parts) + len(self.canaries) + len(self.limited)


class EpochOrder:
    """Shards permuted anew each epoch, `mix_shards` of them at a time, their samples permuted together.

    An epoch sees each trained sample `weight` times and each planted canary as often as its dose. Epochs follow one
    another without a gap: a global batch may hold the end of one and the beginning of the next.

    Args:
        counts: samples of each shard.
        groups: who is planted and how often that is seen, who is held out.
        seed: of the order.
        weights: how often an epoch sees a sample of each shard; of a fraction, another draw each epoch.
        mix_shards: shards of a window.
        max_visits: how often an epoch may see a group of duplicates, or a planted canary; of a group, other members
            are seen each epoch. Sacrificed canaries have no limit. Weights must then be whole numbers. None: any number
            of times.
        keep: where limited groups, which may be many, are kept once they are known; see `memtrain.data.limited`.
    """

    def __init__(
        self,
        counts: Counts,
        groups: Groups,
        seed: int,
        weights: Sequence[float] | None = None,
        mix_shards: int = 8,
        max_visits: int | None = None,
        keep: Keep = as_made,
    ):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.starts = self.counts.cumsum() - self.counts
        self.groups, self.seed, self.mix_shards = groups, seed, mix_shards
        self.doses = groups.doses  # of `groups.planted`
        if max_visits is not None:  # but of those that teach a rule what is seen often
            teaches = among(groups.planted, np.sort(groups.sacrificed))
            self.doses = np.where(teaches, groups.doses, groups.doses.clip(max=max_visits))
        self.limited = self._limit(max_visits, weights, keep)
        apart = groups.apart()
        # what the order of ordinary samples leaves out, each sorted: canaries and reference set, and limited groups
        self.apart = [apart[~among(apart, self.limited.positions)], self.limited.positions]
        bounds = [np.searchsorted(part, np.append(self.starts, self.counts.sum())) for part in self.apart]
        self.trained = self.counts - sum(map(np.diff, bounds))  # per shard, without these
        times = np.ones(len(self.counts)) if weights is None else np.asarray(weights, dtype=np.float64)
        whole = np.floor(times).astype(np.int64)
        fraction = np.rint((times - whole) * self.trained).astype(np.int64)
        shards = np.arange(len(self.counts))
        # here: each visit of a shard in an epoch, and how many of its rows it takes
        self.visits = np.concatenate([shards.repeat(whole), shards[fraction > 0]])
        self.rows_of_visit = np.concatenate([self.trained.repeat(whole), fraction[fraction > 0]])

    def __len__(self) -> int:
        return int(self.rows_of_visit.sum()) + int(self.doses.sum()) + len(self.limited)

    def _limit(self, max_visits: int | None, weights: Sequence[float] | None, keep: Keep) -> LimitedGroups:
        """The groups of duplicates that are seen less often than the corpus holds them."""
        if max_visits is not None and max_visits < 1:
            raise ValueError(f"data.max_visits_per_group must be >= 1, got {max_visits}; null sets no limit")
        if max_visits is not None and weights is not None and any(weight % 1 for weight in weights):
            raise ValueError(
                f"data.max_visits_per_group needs whole weights of sources, got {min(weights):g}; or set it to null"
            )
        weighed = np.ones(len(self.counts)) if weights is None else np.asarray(weights)
        pictures = self.groups.pictures

        def make() -> dict[str, np.ndarray]:
            times = weighed[self._shard_of(pictures.positions)].astype(np.int64)
            generator = _generator(self.seed, Stream.LIMITED_GROUPS)
            return limited_groups(self.groups, self.doses, times, max_visits, generator)

        if max_visits is None:
            return LimitedGroups(**make())
        numbers = np.array([self.seed, max_visits])
        canaries = self.groups.planted, self.groups.sacrificed, self.doses
        inputs = (numbers, self.counts, weighed, *canaries, pictures.positions, pictures.first)
        return LimitedGroups(**keep(make, *inputs))

    def _apart_in(self, shard: int) -> np.ndarray:
        """Which rows of a shard the order of ordinary samples leaves out, sorted."""
        start, end = self.starts[shard], self.starts[shard] + self.counts[shard]
        parts = [part[np.searchsorted(part, start) : np.searchsorted(part, end)] for part in self.apart]
        return np.sort(np.concatenate(parts)) - start

    def _shard_of(self, positions: np.ndarray) -> np.ndarray:
        """The number of the shard in which each position lies. (n,) -> (n,) int64"""
        return np.searchsorted(self.starts + self.counts, positions, side="right")

    def windows(self, epoch: int) -> list[Window]:
        """What is seen together, in order. Canaries are spread over the windows in proportion to their sizes."""
        visits = _generator(self.seed, Stream.SHARD_ORDER, epoch).permutation(len(self.visits))
        planted = np.repeat(self.groups.planted, self.doses)
        planted = _generator(self.seed, Stream.CANARY_ORDER, epoch).permutation(planted)
        # windows of `mix_shards` visits each; canaries end where their share of the rows that were seen ends
        groups = [visits[i : i + self.mix_shards] for i in range(0, len(visits), self.mix_shards)] or [visits]
        seen = np.cumsum([self.rows_of_visit[group].sum() for group in groups])
        bounds = np.rint(seen / max(1, seen[-1]) * len(planted)).astype(np.int64)
        bounds[-1] = len(planted)
        # members of limited groups come where their shard is open, the first time
        limited, first = self.limited.of_epoch(epoch), np.zeros(len(self.counts), dtype=np.int64)
        for number, group in reversed(list(enumerate(groups))):
            first[self.visits[group]] = number
        window_of = first[self._shard_of(limited)]
        by_window = np.argsort(window_of, kind="stable")
        ends = np.searchsorted(window_of[by_window], np.arange(len(groups) + 1))
        limited = limited[by_window]
        return [
            Window(
                epoch,
                number,
                tuple(self.visits[group].tolist()),
                tuple(self.rows_of_visit[group].tolist()),
                planted[0 if number == 0 else bounds[number - 1] : bounds[number]],
                limited[ends[number] : ends[number + 1]],
            )
            for number, group in enumerate(groups)
        ]

    def positions(self, window: Window) -> np.ndarray:
        """The window's rows, permuted. (len(window),) int64"""
        generator = _generator(self.seed, Stream.WINDOW, window.epoch, window.number)
        rows = [window.canaries, window.limited]
        for shard, part in zip(window.shards, window.parts, strict=True):
            start, end = self.starts[shard], self.starts[shard] + self.counts[shard]
            trained = np.delete(np.arange(start, end), self._apart_in(shard))
            rows.append(trained if part == len(trained) else generator.permutation(trained)[:part])
        return generator.permutation(np.concatenate(rows))

    def global_batches(self, size: int, consumed: int, upcoming: Callable[[tuple[int, ...]], None]) -> Iterator:
        """Endless: (size,) positions, from the row after the first `consumed` ones on.

        `upcoming` is told the shards of the open window and of the next, so that they can be fetched.
        """
        epoch, offset = divmod(consumed, len(self))
        left: np.ndarray = np.zeros(0, dtype=np.int64)
        windows = self._windows_from(epoch)
        # here: windows of all epochs from this one on, each with the next
        for window, following in itertools.pairwise(windows):
            if offset >= len(window):
                offset -= len(window)
                continue
            upcoming(window.shards + following.shards)
            left = np.concatenate([left, self.positions(window)[offset:]])
            offset = 0
            for first in range(0, len(left) - size + 1, size):
                yield left[first : first + size]
            left = left[len(left) - len(left) % size :]

    def _windows_from(self, epoch: int) -> Iterator[Window]:
        for number in itertools.count(epoch):
            yield from self.windows(number)


class BucketedOrder(EpochOrder):
    """The same order, cut so that a global batch holds samples of one aspect-ratio bucket.

    A sample waits until its bucket has a global batch together; at the end of an epoch those that still wait,
    fewer than a global batch for each bucket and others each epoch, are left out.

    Args:
        buckets: shard -> bucket of each of its samples.
        rest: what `EpochOrder` takes; weights must be whole numbers.
    """

    def __init__(
        self,
        counts: Counts,
        groups: Groups,
        seed: int,
        weights: Sequence[float],
        mix_shards: int,
        buckets: Callable[[int], np.ndarray],
        max_visits: int | None = None,
        keep: Keep = as_made,
    ):
        super().__init__(counts, groups, seed, weights, mix_shards, max_visits, keep)
        if any(weight % 1 for weight in weights):
            raise ValueError(
                f"data.max_aspect_ratio needs whole weights of sources, got {min(weights):g}; or set it to 1"
            )
        self.buckets = buckets
        # rows of each bucket in an epoch: all samples by their weight, less those apart, plus the planted canaries; the
        # members of limited groups, others each epoch, not counted
        rows: Counter[int] = Counter()
        for number, weight in enumerate(weights):
            of_shard = np.asarray(buckets(number))
            for bucket, count in Counter(np.delete(of_shard, self._apart_in(number)).tolist()).items():
                rows[bucket] += count * int(weight)
        for bucket, dose in zip(self.bucket_of(groups.planted).tolist(), self.doses.tolist(), strict=True):
            rows[bucket] += dose
        self.rows_of_bucket = rows

    def bucket_of(self, positions: np.ndarray) -> np.ndarray:
        """The bucket of the sample at each position; behind all shards, foreign ones are squares. (n,) -> (n,) int64"""
        shards = self._shard_of(positions)
        found = np.zeros(len(positions), dtype=np.int64)
        for shard in np.unique(shards[shards < len(self.counts)]):
            here = shards == shard
            found[here] = self.buckets(int(shard))[positions[here] - self.starts[shard]]
        return found

    def batches_of_epoch(self, size: int, epoch: int = 0) -> int:
        """How many global batches of `size` samples each an epoch has."""
        limited = Counter(self.bucket_of(self.limited.of_epoch(epoch)).tolist())
        return sum(rows // size for rows in (self.rows_of_bucket + limited).values())

    def global_batches(self, size: int, consumed: int, upcoming: Callable[[tuple[int, ...]], None]) -> Iterator:
        if self.batches_of_epoch(size) == 0:
            raise ValueError(
                f"no aspect-ratio bucket has a global batch of {size} in it; lower data.batch_size or "
                "data.max_aspect_ratio, or add shards"
            )
        epoch, skipped = self._epoch_of(consumed // size, size)
        waiting: dict[int, np.ndarray] = {}
        for window, following in itertools.pairwise(self._windows_from(epoch)):
            if window.number == 0:
                waiting = {}
            ready: list[np.ndarray] = []  # global batches that are together with this window's rows
            positions = self.positions(window)
            buckets = self.bucket_of(positions)
            for bucket in np.unique(buckets).tolist():
                rows = np.concatenate([waiting.get(bucket, positions[:0]), positions[buckets == bucket]])
                whole = len(rows) // size * size
                ready += list(rows[:whole].reshape(-1, size))  # (whole,) -> (batches, size)
                waiting[bucket] = rows[whole:]
            if skipped >= len(ready):
                skipped -= len(ready)
                continue
            upcoming(window.shards + following.shards)
            mixed = _generator(self.seed, Stream.BATCH_ORDER, window.epoch, window.number).permutation(len(ready))
            for number in mixed[skipped:]:
                yield ready[number]
            skipped = 0

    def _epoch_of(self, batch: int, size: int) -> tuple[int, int]:
        """The epoch that the global batch of this number lies in, and its number there."""
        if len(self.limited) == 0:
            return divmod(batch, self.batches_of_epoch(size))
        for epoch in itertools.count():
            there = self.batches_of_epoch(size, epoch)
            if batch < there:
                return epoch, batch
            batch -= there
        raise AssertionError("epochs do not end")


class GlobalBatchSampler:
    """Micro-batches of one rank: lists of (step, place in the global batch, position in the corpus).

    The global batch of an optimizer step is `accumulate` x `world_size` x `batch_size` rows. `__len__` counts
    the whole run, so that a loader that starts at `first_step` ends where the uninterrupted one ends.

    Args:
        consumed: rows that were consumed before `first_step`.
        upcoming: is told which shards come next; see `EpochOrder.global_batches`.
    """

    def __init__(
        self,
        order: EpochOrder,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        num_steps: int,
        first_step: int = 0,
        consumed: int = 0,
        upcoming: Callable[[tuple[int, ...]], None] = lambda shards: None,
    ):
        self.order, self.batch_size, self.accumulate = order, batch_size, accumulate
        self.rank, self.world_size = rank, world_size
        self.num_steps, self.first_step, self.consumed, self.upcoming = num_steps, first_step, consumed, upcoming
        self.global_batch_size = batch_size * accumulate * world_size
        if len(order) < self.global_batch_size:
            raise ValueError(
                f"an epoch has {len(order)} samples, fewer than one global batch of {self.global_batch_size} "
                f"(data.batch_size={batch_size} x trainer.accumulate_grad_batches={accumulate} x {world_size} "
                "ranks); lower data.batch_size or add shards"
            )

    def __len__(self) -> int:
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        batches = self.order.global_batches(self.global_batch_size, self.consumed, self.upcoming)
        for step, rows in zip(range(self.first_step, self.num_steps), batches, strict=False):
            for micro in range(self.accumulate):
                first = (micro * self.world_size + self.rank) * self.batch_size
                yield [(step, place, int(rows[place])) for place in range(first, first + self.batch_size)]
