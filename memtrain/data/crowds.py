"""Near hashes among crowds: many rows that all agree in the bits that are looked at.

Of a crowd of n rows, as of a picture that is on the web in ten thousand versions, the n² / 2 pairs are not compared
each: a walk from row to near row joins all that are near, in chains too, and gives n - 1 pairs at most.
"""

from __future__ import annotations

import numpy as np

from memtrain.data.covering import MIRRORED

SIZE = 64  # rows; smaller groups are compared pair by pair


def apart(differ: np.ndarray) -> np.ndarray:
    """Hamming distance, as they are or mirrored, by the bits in which hashes differ. (M, 4) -> (M,)"""
    return np.minimum(_ones(differ), _ones(differ ^ MIRRORED))


def _ones(bits: np.ndarray) -> np.ndarray:
    """How many bits of each row are set; four times as fast as a sum over so short an axis. (M, 4) -> (M,) uint16"""
    ones = np.bitwise_count(bits)
    return ones[:, 0].astype(np.uint16) + ones[:, 1] + ones[:, 2] + ones[:, 3]


def split_off(left: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Take crowds out of places in a sorted list at which the next value is the same. (M,) -> (M less those,)

    Returns also, for each crowd, its first place and the one behind its last.
    """
    if len(left) < SIZE:
        return left, []
    begins = np.append(0, np.flatnonzero(np.diff(left) != 1) + 1)
    lengths = np.diff(np.append(begins, len(left)))
    is_crowd = lengths >= SIZE
    crowds = [
        (int(first), int(first + length) + 1)
        for first, length in zip(left[begins[is_crowd]], lengths[is_crowd], strict=True)
    ]
    return left[~np.repeat(is_crowd, lengths)], crowds


def walk(hashes: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of near rows, by which all are joined that near pairs join, in chains too. (N, 4) -> (M,) twice

    Each row that is reached is compared with those that are not reached yet.
    """
    rest = np.arange(1, len(hashes))
    reached, left, right = [0], [], []
    while len(rest):
        if not reached:
            reached, rest = [int(rest[0])], rest[1:]
            continue
        row = reached.pop()
        is_near = apart(hashes[rest] ^ hashes[row]) <= distance
        near = rest[is_near]
        if len(near):
            rest = rest[~is_near]
            reached += near.tolist()
            left.append(np.full(len(near), row))
            right.append(near)
    none = np.empty(0, np.int64)
    return np.concatenate([none, *left]), np.concatenate([none, *right])
