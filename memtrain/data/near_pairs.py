"""All pairs of perceptual hashes within a Hamming distance, as they are or mirrored, in bounded memory.

In each pass over the hashes some of their bits are looked at (`data.covering`), and those that agree in them meet:
they are neighbours once the numbers that these bits make are sorted. Hashes that meet are compared. No pair within
the distance is missed, where many meet at least none that no chain of others joins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import numpy as np

from memtrain.core.files import written_aside
from memtrain.data.covering import WORDS, BitRange, covering
from memtrain.data.crowds import apart, split_off, walk

ROW_BYTES = 8 * WORDS
_CHUNK = 1 << 20  # rows read at a time
_BLOCK = 1 << 18  # pairs compared at a time
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads what is multiplied by it over the high bits
_PLACE = np.uint64(32)  # bits of a row's number
_LOW = np.uint64(2**32 - 1)
MOST_ROWS = 2**32
# Shares of the memory: numbers that are sorted; both hashes of pairs that are compared, where hashes are on disk
_SORTED, _COMPARED = 0.42, 0.28
_PAIR_BYTES = 2 * ROW_BYTES + 48  # of a pair that is compared: both hashes, and its rows some times over


class Hashes(Protocol):
    """Distinct hashes: `read` gives some rows, (n, 4) uint64, `column` the numbers that a part of their bits makes."""

    def __len__(self) -> int: ...

    def read(self, begin: int, end: int) -> np.ndarray: ...

    def column(self, part: BitRange) -> Numbers: ...


class Numbers(Protocol):
    def read(self, begin: int, end: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Held:
    """Rows in memory."""

    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, begin: int, end: int) -> np.ndarray:
        return self.rows[begin:end]

    def column(self, part: BitRange) -> Numbers:
        return Held(part.of(self.rows))


@dataclass(frozen=True)
class OnDisk:
    """Rows in a file of nothing else: (n, *shape) uint64. They are read, not mapped, so that memory stays bounded."""

    path: Path
    shape: tuple[int, ...] = (WORDS,)

    def __len__(self) -> int:
        return self.path.stat().st_size // self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return 8 * int(np.prod(self.shape))

    def read(self, begin: int, end: int) -> np.ndarray:
        count = (end - begin) * self._row_bytes // 8
        found = np.fromfile(self.path, np.uint64, count, offset=begin * self._row_bytes)
        return found.reshape(-1, *self.shape)

    def column(self, part: BitRange) -> Numbers:
        """Written beside the file, once."""
        there = OnDisk(self.path.with_name(f"{self.path.name}.{part.start}-{part.length}"), ())
        if not there.path.exists():
            with written_aside(there.path, shared=True) as aside, aside.open("wb") as file:
                for begin, end in _chunks(len(self)):
                    part.of(self.read(begin, end)).tofile(file)
        return there


def count_passes(distance: int, count: int) -> int:
    """How many passes over so many hashes find all that are within the distance."""
    return sum(len(part.masks) for part in covering(distance, count))


def near_pairs(
    hashes: Hashes, distance: int, memory: int | None = None, passes: range | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of rows within the distance, as they are or mirrored: (M,) and (M,) int64, left < right, in parts.

    Where more than `crowds.SIZE` rows agree in what a pass looks at, it gives pairs that join the same rows, in place
    of all pairs: a pair that does not come is joined by others, in a chain of near ones.

    Args:
        hashes: no two alike, also not where one is mirrored.
        memory: bytes that arrays here may take; None: as much as there is.
        passes: some of the passes, of `count_passes`; the pairs of all of them are all pairs. A pair may come more
            than once.
    """
    count = len(hashes)
    if count > MOST_ROWS:
        raise ValueError(f"{count} distinct hashes are more than {MOST_ROWS}; look for duplicates in parts of them")
    plan = covering(distance, count)
    all_passes = [(part, number) for part in range(len(plan)) for number in range(len(plan[part].masks))]
    room = 1 << 62 if memory is None else memory
    if memory is not None and not isinstance(hashes, Held) and count * (ROW_BYTES + 16) < 0.7 * memory:
        hashes, room = Held(hashes.read(0, count)), memory - ROW_BYTES * count
    rows = min(count, max(_CHUNK, int(room * _SORTED) // 8))
    # pairs compared at a time: the more, the seldomer all hashes are read
    most = 16 * _BLOCK if isinstance(hashes, Held) else max(_BLOCK, int(room * _COMPARED) // _PAIR_BYTES)
    sorting = np.empty(rows, np.uint64)
    gathered: list[np.ndarray] = []
    begun: tuple[int, int] | None = None  # part and pass in which the first of these met

    def compared(part: int, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        pairs = np.concatenate(gathered)
        gathered.clear()
        pairs.sort()  # by their left row; np.unique would hash them, which takes ten times as long
        pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
        for begin in range(0, len(pairs), most):  # more may have met at once
            near, differ = _compare(hashes, pairs[begin : begin + most], distance)
            near = near[~_met_before(differ, plan, part, number)]
            yield (near >> _PLACE).astype(np.int64), (near & _LOW).astype(np.int64)

    wanted = [all_passes[place] for place in (range(len(all_passes)) if passes is None else passes)]
    for part, in_part in groupby(wanted, itemgetter(0)):
        column = hashes.column(plan[part])
        for _, number in in_part:
            mask = plan[part].masks[number]
            crowds: list[np.ndarray] = []
            for pairs in _meeting(column, mask, plan[part].mirrored & mask, count, sorting, crowds):
                begun = begun or (part, number)
                gathered.append(pairs)
                if sum(map(len, gathered)) >= most:
                    yield from compared(*begun)
                    begun = None
            if crowds:
                yield _walk_crowds(hashes, crowds, distance)
    if begun:
        yield from compared(*begun)


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + _CHUNK, count)) for begin in range(0, count, _CHUNK))


def _meeting(
    column: Numbers, mask: np.uint64, flip: np.uint64, count: int, sorting: np.ndarray, crowds: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Pairs of rows whose numbers agree where the mask looks, as they are or with the bits of `flip` changed.

    Rows go by a number that is the same for these: the lesser of the two, spread over 64 bits, of which the highest
    are kept, and the row below them. Where not all fit into `sorting`, one range of numbers is taken after the other.

    Yields: (M,) uint64 of left row · 2^32 + right row, left < right.
    """
    row_bits = np.uint64(max(1, (count - 1).bit_length()))
    low = np.uint64(2 ** int(row_bits) - 1)
    ranges = -(-count // len(sorting))
    if ranges > 1:
        ranges = -(-count * 21 // (len(sorting) * 20))  # they are not all alike
    bounds = [2**64 * n // ranges for n in range(ranges + 1)]
    todo = [*pairwise(bounds)]
    while todo:
        begin, end = todo.pop()
        used = _fill(sorting, column, mask, flip, count, (begin, end), low)
        if used is None:  # more rows than fit are in this range
            if end - begin <= int(low) + 1:
                raise ValueError("too many hashes agree in half their bits for the memory; raise memory")
            todo += [(begin, (begin + end) // 2), ((begin + end) // 2, end)]
            continue
        found = sorting[:used]
        found.sort()
        yield from _neighbours(found, low, crowds)


def _fill(
    sorting: np.ndarray, column: Numbers, mask: np.uint64, flip: np.uint64, count: int, within: tuple[int, int],
    low: np.uint64,
) -> int | None:  # fmt: skip
    """Fill `sorting` with the rows whose number is within the range; returns how many, None where they do not fit."""
    begin_number, end_number = within
    is_all = end_number - begin_number == 2**64
    used = 0
    for begin, end in _chunks(count):
        numbers = column.read(begin, end) & mask
        np.minimum(numbers, numbers ^ flip, out=numbers)
        numbers *= _ODD
        rows = np.arange(begin, end, dtype=np.uint64)
        if not is_all:
            inside = (numbers >= np.uint64(begin_number)) & (numbers <= np.uint64(end_number - 1))
            numbers, rows = numbers[inside], rows[inside]
        if used + len(rows) > len(sorting):
            return None
        numbers &= ~low
        np.bitwise_or(numbers, rows, out=sorting[used : used + len(rows)])
        used += len(rows)
    return used


def _neighbours(found: np.ndarray, low: np.uint64, crowds: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Pairs of rows with the same number above their lowest bits, which are the row. (N,) sorted -> (M,) each.

    Rows of which many have the same number are put into `crowds` instead.
    """
    starts = [np.empty(0, np.int64)]
    for begin, end in _chunks(len(found) - 1):
        same = (found[begin + 1 : end + 1] ^ found[begin:end]) <= low
        starts.append(np.flatnonzero(same) + begin)
    left, in_crowds = split_off(np.concatenate(starts))
    crowds += [found[begin:end] & low for begin, end in in_crowds]
    further = 1
    while len(left):  # each row with the one so much further on
        yield (found.take(left) & low) << _PLACE | (found.take(left + further) & low)
        further += 1
        left = left[left + further < len(found)]
        left = left[(found.take(left + further) ^ found.take(left)) <= low]


def _walk_crowds(hashes: Hashes, crowds: list[np.ndarray], distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows, (M,) twice, that join what is near within each crowd."""
    rows = np.unique(np.concatenate(crowds)).astype(np.int64)
    if isinstance(hashes, Held):
        found = hashes.rows[rows]
    else:
        found = np.concatenate(
            [
                hashes.read(begin, end)[rows[slice(*np.searchsorted(rows, (begin, end)))] - begin]
                for begin, end in _chunks(len(hashes))
            ]
        )
    lefts, rights = [], []
    for crowd in crowds:
        left, right = walk(found[np.searchsorted(rows, crowd.astype(np.int64))], distance)
        lefts.append(crowd[left].astype(np.int64))
        rights.append(crowd[right].astype(np.int64))
    one, other = np.concatenate(lefts), np.concatenate(rights)
    return np.minimum(one, other), np.maximum(one, other)


def _compare(hashes: Hashes, pairs: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of the pairs that are near, and the bits in which they differ. (M,) sorted -> (K,), (K, 4)"""
    if isinstance(hashes, Held):
        return _compare_held(hashes, pairs, distance)
    return _compare_read(hashes, pairs, distance)


def _rows(hashes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Rows by their numbers; `hashes[numbers]` takes four times as long. (N, 4), (M,) -> (M, 4)"""
    return hashes.take(numbers.astype(np.int64), axis=0)


def _compare_held(hashes: Held, pairs: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    near, differ = [pairs[:0]], [np.empty((0, WORDS), np.uint64)]
    for begin in range(0, len(pairs), _BLOCK):
        block = pairs[begin : begin + _BLOCK]
        bits = _rows(hashes.rows, block >> _PLACE) ^ _rows(hashes.rows, block & _LOW)
        is_near = apart(bits) <= distance
        near.append(block[is_near])
        differ.append(bits[is_near])
    return np.concatenate(near), np.concatenate(differ)


def _compare_read(hashes: Hashes, pairs: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads the hashes once, one after the other."""
    left = pairs >> _PLACE  # sorted
    right = (pairs & _LOW) << _PLACE | np.arange(len(pairs), dtype=np.uint64)  # right row · 2^32 + place of the pair
    right.sort()
    bits = np.empty((len(pairs), WORDS), np.uint64)
    others = np.empty((len(pairs), WORDS), np.uint64)
    for begin, end in _chunks(len(hashes)):
        one = slice(*np.searchsorted(left, np.array([begin, end], np.uint64)))
        other = slice(*np.searchsorted(right, np.array([begin, end], np.uint64) << _PLACE))
        if end == MOST_ROWS:
            other = slice(other.start, len(right))
        if one.start == one.stop and other.start == other.stop:
            continue
        rows = hashes.read(begin, end)
        bits[one] = _rows(rows, left[one] - np.uint64(begin))
        others[(right[other] & _LOW).astype(np.int64)] = _rows(rows, (right[other] >> _PLACE) - np.uint64(begin))
    near = np.zeros(len(pairs), bool)
    for begin in range(0, len(pairs), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        bits[block] ^= others[block]
        near[block] = apart(bits[block]) <= distance
    return pairs[near], bits[near]


def _met_before(differ: np.ndarray, plan: list[BitRange], part: int, number: int) -> np.ndarray:
    """Which pairs, by the bits in which they differ, have met in passes before this one. (M, 4) -> (M,) bool

    Of earlier parts it is asked whether they have to have: so a pair may come again from another part.
    """
    before = np.zeros(len(differ), bool)
    for earlier in plan[:part]:
        values = earlier.of(differ)
        unlike = np.minimum(np.bitwise_count(values), np.bitwise_count(values ^ earlier.mirrored))
        before |= unlike <= earlier.radius
    rest = np.flatnonzero(~before)
    values = plan[part].of(differ[rest])
    for mask in plan[part].masks[:number]:
        if not len(rest):
            break
        met = ((values & mask) == 0) | (((values ^ plan[part].mirrored) & mask) == 0)
        before[rest[met]] = True
        rest, values = rest[~met], values[~met]
    return before
