"""Groups of exact and near duplicates: duplication is what causes memorization.

Exact: equal sha256. Near: PDQ, the perceptual hash of 256 bits, within a Hamming distance of 31, its authors'
advice, of pictures with a PDQ quality of at least 50: a flat picture has no features to compare, and equals
only itself. PDQ survives re-encoding and resizing. A mirror image is near, too: its hash is known from that of the
picture. Crops that take away more than a few pixels in a hundred are not found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.data.check import (
    Progress,
    codes,
    first_equal,
    image_sha256,
    over_shards,
    read_extent,
)
from memtrain.data.columns import parse_json
from memtrain.data.hashes import perceptual_hash
from memtrain.data.images import BadSample
from memtrain.data.paths import GROUPS, check_file
from memtrain.data.shards import index_shard
from memtrain.data.sources import LocalShard

MIN_QUALITY = 50  # of 100
CHUNKS = 16  # of 16 bits each
MAX_DISTANCE = 3 * CHUNKS - 1  # beyond, each chunk would have to be looked up with 697 neighbours or more
# PDQ's bits, 16 x 16, are the signs of a discrete cosine transform about its median. Mirrored left to right, what
# varies by an odd number of half waves across changes its sign: every second bit of a row, which is one word here
MIRRORED = np.uint16(0x5555)
_BLOCK = 1 << 18  # pairs compared at a time
_NUMBERS = np.arange(2**16, dtype=np.uint16)
# each number's two bytes (65536, 2) -> its bits (65536, 16) -> how many of them are set (65536,)
_BITS = np.unpackbits(_NUMBERS.view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)

COLUMNS = pa.schema(
    [
        ("group", pa.int64()),
        ("kind", pa.string()),
        ("key", pa.string()),
        ("sha256", pa.string()),
        ("pdq", pa.string()),
        ("quality", pa.int32()),
        ("caption", pa.string()),
    ]
)
_HASHES = pa.schema([("entry", pa.int32()), ("sha256", pa.binary(32)), ("pdq", pa.binary(32)), ("quality", pa.int32())])


@dataclass(frozen=True)
class Duplicates:
    """`groups`: a row for each sample of each group, in the columns of `COLUMNS`, the largest group first.

    A group of kind exact has one sha256; in a group of kind near, equal sha256 are exact duplicates too.
    `unreadable`: (sample key, why) of what could not be hashed.
    """

    groups: pa.Table
    num_samples: int
    unreadable: list[tuple[str, str]]


def find_duplicates(shards: Sequence[LocalShard], distance: int, workers: int, progress: Progress) -> Duplicates:
    """Hash every image of the shards and group them. In memory at once: about 600 bytes a sample.

    Args:
        distance: of 256 bits, how many near duplicates may differ in.

    Raises:
        ValueError: `distance` is out of range.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"--distance must be from 0 to {MAX_DISTANCE} bits, got {distance}")
    found = list(over_shards(hash_shard, shards, workers, progress))
    tables = [table for table, _ in found]
    hashes = pa.concat_tables(tables)
    shard = np.repeat(np.arange(len(shards)), [len(table) for table in tables])
    groups = _describe(group(hashes, distance), hashes, shard, shards)
    return Duplicates(groups, len(hashes), [problem for _, problems in found for problem in problems])


def hash_shard(shard: LocalShard) -> tuple[pa.Table, list[tuple[str, str]]]:
    """Number of the entry, sha256, PDQ and its quality of each sample of a shard; (key, why) of the rest."""
    rows, problems = [], []
    try:
        entries = index_shard(shard.path).entries
        with shard.path.open("rb") as file:
            for number, entry in enumerate(entries):
                data = read_extent(file, entry.image)
                metadata = parse_json(read_extent(file, entry.metadata)) if entry.metadata else {}
                try:
                    pdq, quality = perceptual_hash(data)
                except BadSample as problem:
                    problems.append((f"{shard.name}/{entry.key}", str(problem)))
                    continue
                digest = image_sha256(data, metadata)
                rows.append({"entry": number, "sha256": digest, "pdq": pdq, "quality": quality})
    except OSError as error:
        problems.append((shard.name, f"shard cannot be read: {error.strerror or error}"))
    return pa.Table.from_pylist(rows, _HASHES), problems


def group(hashes: pa.Table, distance: int) -> np.ndarray:
    """A label for each sample, equal for those that exact and near duplicates join, in chains too. (N,)"""
    words = np.frombuffer(b"".join(hashes["pdq"].to_pylist()), np.uint16).reshape(-1, CHUNKS)  # 32 N bytes -> (N, 16)
    return components(codes(hashes["sha256"]), words, hashes["quality"].to_numpy(), distance)


def components(digests: np.ndarray, words: np.ndarray, quality: np.ndarray, distance: int) -> np.ndarray:
    """A label for each image, equal for those that exact and near duplicates join, in chains too. (N,) int64

    Args:
        digests: (N,) numbers from 0 to less than N, equal for exact duplicates.
        words: (N, 16) uint16, the PDQ.
        quality: (N,) of the PDQ; from `MIN_QUALITY` on it tells near duplicates.
        distance: of 256 bits, how many near duplicates may differ in.
    """
    labels = join(np.arange(len(digests)), np.arange(len(digests)), first_equal(digests))
    good = np.flatnonzero(quality >= MIN_QUALITY)
    if len(good) == 0:
        return labels
    # equal hashes are joined first, so that pairs are looked for among distinct ones alone
    same = first_equal(np.unique(words[good], axis=0, return_inverse=True)[1].reshape(-1))  # (G,)
    labels = join(labels, good, good[same])
    distinct = good[np.unique(same)]
    # D distinct hashes as they are and mirrored, (2 D, 16); of equal ones the first stands for all
    both = np.concatenate([words[distinct], words[distinct] ^ MIRRORED])
    source = np.concatenate([distinct, distinct])
    unlike, first, place = np.unique(both, axis=0, return_index=True, return_inverse=True)
    labels = join(labels, source, source[first[place.reshape(-1)]])
    for left, right in near_pairs(unlike, distance):
        labels = join(labels, source[first[left]], source[first[right]])
    return labels


def join(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Labels, (N,), once the rows of each pair are of one component; a label is its component's least row."""
    while True:
        one, other = labels[left], labels[right]
        apart = one != other
        if not apart.any():
            return labels
        left, right, one, other = left[apart], right[apart], one[apart], other[apart]
        labels = labels.copy()
        np.minimum.at(labels, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]


def near_pairs(words: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of rows that differ in at most `distance` bits, in parts; a pair may come more than once.

    Multi-index hashing: of 16 chunks, one differs in at most distance // 16 bits, or all together would
    differ in more. So only rows that agree so far in some chunk are compared: for a distance of 31, 272 in
    65,536 of all pairs of random hashes, 0.7 s for 50,000 of them and 2 min for a million, on one core (the
    time grows with the square). Rows that do lie close are compared once for each chunk that agrees.

    Args:
        words: (N, 16) uint16, no two rows alike.
    """
    masks = np.flatnonzero(distance // CHUNKS >= _BITS).astype(np.uint16)  # 1, 17 or 137 of them
    none = np.empty(0, np.int64)
    gathered, count = [(none, none)], 0
    for chunk in range(CHUNKS):
        order = np.argsort(words[:, chunk], kind="stable")
        ranked = words[order]  # here: rows by the value of this chunk, so that equal ones are neighbours
        start = np.searchsorted(ranked[:, chunk], np.arange(2**16 + 1))  # of each value's rows
        for mask in masks:
            wanted = (ranked[:, chunk] ^ mask).astype(np.int64)
            begin = np.maximum(start[wanted], np.arange(1, len(words) + 1))  # each pair once
            for left, right in _expand(begin, start[wanted + 1]):
                # half the bits tell most apart
                close = _distance(ranked[left, :8], ranked[right, :8]) <= distance
                left, right = left[close], right[close]
                close = _distance(ranked[left], ranked[right]) <= distance
                gathered.append((order[left[close]], order[right[close]]))
                count += int(np.count_nonzero(close))
                if count >= _BLOCK:
                    yield _joined(gathered)
                    gathered, count = [], 0
    if gathered:
        yield _joined(gathered)


def _joined(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Parts of pairs, each two of (M,), as one: two of (sum of M,)."""
    left, right = zip(*pairs, strict=True)
    return np.concatenate(left), np.concatenate(right)


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Hamming distance of rows of 16-bit words. (M, w), (M, w) -> (M,)"""
    return _BITS[one ^ other].sum(1, dtype=np.uint16)


def _expand(begin: np.ndarray, end: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of row i with each of begin[i] .. end[i] - 1, about `_BLOCK` at a time. Two of (N,) -> two of (M,) each"""
    counts = np.maximum(end - begin, 0)
    ends, row = counts.cumsum(), 0
    while row < len(counts):
        done = ends[row - 1] if row else 0
        stop = max(row + 1, int(np.searchsorted(ends, done + _BLOCK, side="right")))
        number = counts[row:stop]
        left = np.repeat(np.arange(row, stop), number)
        # the n-th pair of a row is with begin + n: the place in the block, less where the row's pairs begin in it
        right = np.arange(len(left)) + np.repeat(begin[row:stop] - (ends[row:stop] - number - done), number)
        yield left, right
        row = stop


def _describe(labels: np.ndarray, hashes: pa.Table, shard: np.ndarray, shards: Sequence[LocalShard]) -> pa.Table:
    """The table of the groups of at least two; keys and captions are read again, of these samples alone."""
    _, component, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(sizes[component] > 1)
    # here: the largest group first, of equally large ones the one that comes first, each in the order of the corpus
    rows = rows[np.lexsort((rows, labels[rows], -sizes[component[rows]]))]
    number = np.unique(labels[rows], return_inverse=True)[1]
    order = first_equal(number)  # place of each group's first row
    # groups are numbered in this order; one that holds several sha256 is of near duplicates
    number = np.unique(order, return_inverse=True)[1]
    digests = codes(hashes["sha256"])[rows]
    mixed = np.unique(number[digests != digests[order]])
    table = hashes.take(rows)
    keys, captions = _read_again(shards, shard[rows], table["entry"].to_numpy())
    columns = {
        "group": number,
        "kind": np.where(np.isin(number, mixed), "near", "exact").tolist(),
        "key": keys,
        "sha256": [digest.hex() for digest in table["sha256"].to_pylist()],
        "pdq": [pdq.hex() for pdq in table["pdq"].to_pylist()],
        "quality": table["quality"],
        "caption": captions,
    }
    return pa.table(columns, schema=COLUMNS)


def _read_again(shards: Sequence[LocalShard], shard: np.ndarray, entry: np.ndarray) -> tuple[list[str], list[str]]:
    """Keys and captions of these entries of these shards."""
    keys, captions = [""] * len(shard), [""] * len(shard)
    for number in np.unique(shard):
        entries = index_shard(shards[number].path).entries
        with shards[number].path.open("rb") as file:
            for row in np.flatnonzero(shard == number):
                found = entries[entry[row]]
                keys[row] = f"{shards[number].name}/{found.key}"
                captions[row] = read_extent(file, found.caption).decode("utf-8", errors="replace").strip()
    return keys, captions


def read_groups(path: str | Path, name: str) -> pa.Table:
    """Columns group and key of what `find_duplicates` found, a row a sample, as `memtrain shards duplicates` wrote it.

    Raises:
        ValueError: it is no such file; `name` is what the user called it.
    """
    file = check_file(name, path, GROUPS)
    try:
        return pq.read_table(file, columns=["group", "key"])
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{name}={path} cannot be read ({str(error).splitlines()[0]}); {GROUPS}") from error
