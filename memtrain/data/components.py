"""Which images are joined by exact and near duplicates, in chains too, of as many as fit into memory."""

from __future__ import annotations

import numpy as np

from memtrain.data.covering import MIRRORED
from memtrain.data.hashes import MIN_QUALITY
from memtrain.data.near_pairs import Held, near_pairs


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
    # equal hashes are joined first, so that pairs are looked for among distinct ones alone. Of a hash and that of the
    # mirror image, the one without the lowest bit of all stands for both
    rows = np.ascontiguousarray(words[good]).view(np.uint64)  # (G, 16) uint16 -> (G, 4)
    rows = np.where(rows[:, :1] & np.uint64(1), rows ^ MIRRORED, rows)
    same = first_equal(np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1))  # (G,)
    labels = join(labels, good, good[same])
    distinct = np.unique(same)
    for left, right in near_pairs(Held(rows[distinct]), distance):
        labels = join(labels, good[distinct[left]], good[distinct[right]])
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


def first_equal(numbers: np.ndarray) -> np.ndarray:
    """Of each number, from 0 to less than N, the place of the first one that equals it. (N,) -> (N,)"""
    first = np.empty(len(numbers), dtype=np.int64)
    first[numbers[::-1]] = np.arange(len(numbers))[::-1]  # the last to be written stays
    return first[numbers]
