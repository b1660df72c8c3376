"""Foreign pictures: sacrificed canaries that are nobody's, behind the corpus as a shard that is not there.

A corpus of N samples and F foreign pictures has positions 0..N+F-1; those from N on are named `foreign/000000` and
so on. Everything that goes by positions takes them as it takes the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from memtrain.data.batches import Latents, Samples
from memtrain.data.images import BadSample
from memtrain.data.latents import CachedSample
from memtrain.data.view import STRAIGHT, Seen, View

KEY = re.compile(r"foreign/\d{6}")  # no key of a shard is like that: theirs begin with a tar's path


def is_foreign(key: str) -> bool:
    """Whether a sample's key is that of a foreign picture."""
    return KEY.fullmatch(key) is not None


class WithForeign:
    """The samples of a corpus, and behind them the first `count` of other samples. See `memtrain.data.batches.Samples`.

    Args:
        corpus: keeps its positions and its keys.
        foreign: of the same resolution; seen as squares.
        count: how many of them.

    Raises:
        ValueError: there are not so many, or one cannot be decoded.
    """

    def __init__(self, corpus: Samples, foreign: Samples, count: int):
        self.corpus, self.foreign, self.count = corpus, foreign, count
        self.first = int(np.sum(corpus.counts))
        self.sizes = corpus.sizes
        there = int(np.sum(foreign.counts))
        if there < count:
            raise ValueError(
                f"canaries.foreign has {there} pictures, not canaries.sacrificed={count}; lower it or add some"
            )
        for number in range(count):
            try:
                foreign.get(number, STRAIGHT, self.sizes[0])
            except BadSample as problem:
                raise ValueError(
                    f"canaries.foreign: {foreign.key(number)} cannot be used ({problem}); leave it out of the shard"
                ) from None

    @property
    def counts(self) -> list[int]:
        return [*(int(count) for count in self.corpus.counts), self.count]

    def key(self, index: int) -> str:
        return self.corpus.key(index) if index < self.first else f"foreign/{index - self.first:06d}"

    def size_of(self, index: int) -> tuple[int, int]:
        return self.corpus.size_of(index) if index < self.first else self.sizes[0]

    def get(self, index: int, view: View, size: tuple[int, int]) -> Seen:
        if index < self.first:
            return self.corpus.get(index, view, size)
        return self.foreign.get(index - self.first, view, size)

    def prefetch(self, numbers: Sequence[int]) -> None:
        self.corpus.prefetch(numbers)

    def read_ahead(self, indices: Sequence[int]) -> None:
        self.corpus.read_ahead([index for index in indices if index < self.first])


class LatentsWithForeign:
    """Latents of a corpus from a cache, and those of foreign pictures behind them. See `memtrain.data.batches.Latents`.

    Args:
        cache: of the corpus.
        samples: the corpus and the foreign pictures.
        encoded: of each foreign picture what a cache would hold: as it is, and mirrored.
    """

    def __init__(self, cache: Latents, samples: WithForeign, encoded: Sequence[tuple[CachedSample, CachedSample]]):
        self.cache, self.samples, self.encoded = cache, samples, encoded

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.cache.shapes()

    def get(self, index: int, flip: bool) -> CachedSample:
        if index < self.samples.first:
            return self.cache.get(index, flip)
        return self.encoded[index - self.samples.first][flip]
