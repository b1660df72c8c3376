"""Positions in a corpus: which records of its shards are samples, and where each of them stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from memtrain.data.row_filter import FilteredRows


class SampleRows:
    """Translates between positions in a corpus, rows of a shard and records of its index.

    A shard's index has *records*. The filter passes some of them: its *rows*, by whose number latents are cached
    and buckets are kept. A list may exclude some of these. The rest are *samples*, whose *positions* follow one
    another from shard to shard.

    Args:
        records: how many each shard's index has.
        filtered: the rows of each shard.
        excluded: shard -> rows of it that a list leaves out, sorted.
    """

    def __init__(self, records: Sequence[int], filtered: FilteredRows, excluded: Mapping[int, np.ndarray]):
        self.filtered, self.excluded = filtered, excluded
        self.records = np.array(records, dtype=np.int64)
        self.counts = np.array(filtered.counts, dtype=np.int64)  # samples of each shard
        for number, rows in excluded.items():
            self.counts[number] -= len(rows)
        self.ends = self.counts.cumsum()
        self.starts = self.ends - self.counts  # position of each shard's first sample

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, position: int) -> tuple[int, int]:
        """Shard and row of the sample at a position."""
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        number = int(np.searchsorted(self.ends, position, side="right"))
        row = int(position - self.starts[number])
        if number in self.excluded:
            excluded = self.excluded[number]  # row i of them has excluded[i] - i that stay before it
            row += int(np.searchsorted(excluded - np.arange(len(excluded)), row, side="right"))
        return number, row

    def without_excluded(self, number: int, values: np.ndarray) -> np.ndarray:
        """Those of a shard's values, one a row, that belong to samples. (counts[number],)"""
        return np.delete(values, self.excluded[number]) if number in self.excluded else values

    def samples_of(self, number: int) -> np.ndarray:
        """Which of a shard's records are samples, in order. (counts[number],)"""
        return self.without_excluded(number, np.arange(self.records[number])[self.filtered.rows(number)])

    def positions_of(self, records: np.ndarray) -> np.ndarray:
        """Positions of records, sorted and numbered shard by shard; -1 where filter or list drops one. (n,)"""
        starts = self.records.cumsum() - self.records
        bounds = np.searchsorted(records, np.append(starts, self.records.sum()))
        found = np.full(len(records), -1, dtype=np.int64)
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            mine = slice(bounds[number], bounds[number + 1])
            place = np.full(self.records[number], -1, dtype=np.int64)
            place[self.samples_of(number)] = np.arange(self.starts[number], self.ends[number])
            found[mine] = place[records[mine] - starts[number]]
        return found
