"""Which bits of two hashes to compare, so that no two within a Hamming distance are missed.

The 256 bits are cut into parts of a radius each, so that hashes within the distance differ in at most the radius of
at least one part: where the radii plus one add up to more than the distance, not all parts can be beyond theirs.

Within a part of radius r, a code word for each v of F_2^(r+1) but 0 says which bits are looked at: bit i, where
<m_i, v> = 1 for a fixed m_i in F_2^(r+1). Two values that differ in bits I, |I| <= r, agree in all bits that some v
looks at: the m_i of I span at most r dimensions, so that some v != 0 is orthogonal to all of them (covering LSH,
Pagh, Locality-sensitive Hashing without False Negatives, SODA 2016). This holds for any choice of the m_i; chosen
are those that let few unlike hashes agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

BITS = 256
WORDS = BITS // 64
# PDQ's bits, 16 x 16, are the signs of a discrete cosine transform about its median. Mirrored left to right, what
# varies by an odd number of half waves across changes its sign: every second bit of a row
MIRRORED = np.uint64(0x5555555555555555)  # of each word
_FEWEST, _MOST = 4, 16  # parts: of at most 64 bits, and of few enough bits that agree by chance
_ROW_SECONDS, _PAIR_SECONDS = 20e-9, 60e-9  # of a row in a pass, of a pair that is compared: their ratio matters


@dataclass(frozen=True)
class BitRange:
    """A part of the bits: `length`, at most 64, from bit `start` on; `masks` are those that are looked at."""

    start: int
    length: int
    masks: np.ndarray  # (2^(radius + 1) - 1,) uint64

    @property
    def radius(self) -> int:
        return len(self.masks).bit_length() - 1

    def of(self, words: np.ndarray) -> np.ndarray:
        """These bits of hashes, as numbers. (…, 4) uint64 -> (…,) uint64"""
        word, shift = divmod(self.start, 64)
        value = words[..., word] >> np.uint64(shift)
        if shift + self.length > 64:
            value = value | words[..., word + 1] << np.uint64(64 - shift)
        return value & np.uint64(2**self.length - 1)

    @property
    def mirrored(self) -> np.uint64:
        """Which of these bits change their sign in a mirror image."""
        return np.uint64(self.of(np.full(WORDS, MIRRORED)))


def covering(distance: int, count: int) -> list[BitRange]:
    """Parts and masks by which any two hashes within this distance meet: what takes least time for so many hashes.

    More and shorter parts need fewer passes over all hashes, and let more unlike ones meet.
    """
    plans = [parts(distance, number) for number in range(_FEWEST, _MOST + 1)]
    return min(plans, key=lambda plan: _seconds(plan, count))


def parts(distance: int, number: int) -> list[BitRange]:
    """So many parts of about the same length and radius; those of radius -1, which none needs, are left out."""
    bounds = [BITS * n // number for n in range(number + 1)]
    shares = [(distance + 1) * (n + 1) // number - (distance + 1) * n // number for n in range(number)]
    return [
        BitRange(begin, end - begin, _code(share, end - begin))
        for (begin, end), share in zip(pairwise(bounds), shares, strict=True)
        if share
    ]


def effort(plan: list[BitRange], count: int) -> tuple[float, float]:
    """Rows times passes, and how many pairs of random hashes meet, as they are or mirrored, among so many."""
    passes = sum(len(part.masks) for part in plan)
    chance = sum(float(np.exp2(-np.bitwise_count(part.masks).astype(float)).sum()) for part in plan)
    return float(passes * count), float(count) ** 2 * chance


def _seconds(plan: list[BitRange], count: int) -> float:
    rows, pairs = effort(plan, count)
    return rows * _ROW_SECONDS + pairs * _PAIR_SECONDS


@cache
def _code(dimension: int, length: int) -> np.ndarray:
    """The masks of a code: for each v in F_2^dimension but 0, the bits i with <m_i, v> = 1. (2^dimension - 1,) uint64

    The m_i are chosen one by one, each so that the chance that two random values agree stays lowest.
    """
    numbers = np.arange(1, 2**dimension)
    candidates = numbers[:: max(1, len(numbers) // 255)]
    # (candidates, v): whether bit m would be looked at by v
    looks = np.bitwise_count(candidates[:, None] & numbers) % 2 == 1
    chance, masks = np.ones(len(numbers)), np.zeros(len(numbers), np.uint64)
    for bit in range(length):
        best = int(np.argmin(np.where(looks, chance / 2, chance).sum(1)))
        chance = np.where(looks[best], chance / 2, chance)
        masks |= looks[best].astype(np.uint64) << np.uint64(bit)
    return masks
