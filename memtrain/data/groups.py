"""Who is a canary and who is held out; all others are trained on as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from memtrain.core.exclusion import CANARY, REFERENCE, SACRIFICED, TRAINED
from memtrain.core.streams import Stream, place_seed
from memtrain.data.canaries import FOREIGN, Canary, largest_groups, of_list, one_a_picture, plant, positions_of
from memtrain.data.pictures import NO_DUPLICATES, Pictures, among

Counts = Sequence[int] | np.ndarray  # samples of each shard, in the order of the corpus

HELD_OUT = "held_out"  # group, in lists of samples, of those of the reference set that are named and not looked at

_HOME_SHARDS = 16  # planted canaries and reference set come from so many shards, so that few must be fetched first


def stream_generator(seed: int, stream: Stream, number: int = 0, part: int = 0) -> np.random.Generator:
    """Draws that depend on these numbers alone."""
    return np.random.default_rng(place_seed(seed, stream, number * 1_000_003 + part, 0))


@dataclass(frozen=True)
class Groups:
    """A partition of N samples: canaries and reference set; all others are trained on as they are.

    Canaries are planted, each seen many times an epoch; or they are the corpus' own groups of duplicates, or what a
    list names, of which every member is a canary. The last `num_foreign` samples are not of the corpus.
    """

    num_samples: int
    canaries: tuple[Canary, ...] = ()
    num_sacrificed: int = 0  # the first so many of the canaries, which no rule may exclude
    reference: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    pictures: Pictures = NO_DUPLICATES
    num_foreign: int = 0

    @cached_property
    def sacrificed(self) -> np.ndarray:
        """Positions of the canaries that no rule may exclude."""
        return positions_of(self.canaries[: self.num_sacrificed])

    @cached_property
    def canary(self) -> np.ndarray:
        """Positions of the other canaries."""
        return positions_of(self.canaries[self.num_sacrificed :])

    @cached_property
    def planted(self) -> np.ndarray:
        """The canaries that are seen more often than the corpus holds them."""
        return positions_of([canary for canary in self.canaries if canary.is_planted])

    @cached_property
    def doses(self) -> np.ndarray:
        """How often an epoch sees each of `planted`. int64"""
        return np.array([canary.repeats for canary in self.canaries if canary.is_planted], dtype=np.int64)

    def of(self, positions: np.ndarray) -> np.ndarray:
        """Group of each position, core.exclusion's TRAINED, CANARY, REFERENCE or SACRIFICED. int64"""
        return self._looked_up(positions, self._numbered[1], TRAINED)

    def canary_of(self, positions: np.ndarray) -> np.ndarray:
        """The number of the canary that each position shows; -1 where it shows none. (n,) -> (n,) int64"""
        return self._of_canaries(positions, [canary.number for canary in self.canaries], -1)

    def repeats_of(self, positions: np.ndarray) -> np.ndarray:
        """How often an epoch sees each position's canary; 0 where it is none. (n,) -> (n,) int64"""
        return self._of_canaries(positions, [canary.repeats for canary in self.canaries], 0)

    def kind_of(self, positions: np.ndarray) -> list[str]:
        """The kind of each position's canary; empty where it is none. (n,) -> n"""
        kinds = [*(canary.kind for canary in self.canaries), ""]
        return [kinds[place] for place in self._looked_up(positions, self._numbered[2], -1).tolist()]

    @cached_property
    def _numbered(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The positions of all but the ordinary samples, sorted; the group of each; its place in `canaries`, or -1."""
        groups = np.where(np.arange(len(self.canaries)) < self.num_sacrificed, SACRIFICED, CANARY)
        places = np.arange(len(self.canaries)).repeat([len(canary.positions) for canary in self.canaries])
        known = np.concatenate([positions_of(self.canaries), self.reference])
        group = np.concatenate([groups[places], np.full(len(self.reference), REFERENCE)])
        place = np.concatenate([places, np.full(len(self.reference), -1)])
        order = np.argsort(known, kind="stable")
        return known[order], group[order], place[order]

    def _looked_up(self, positions: np.ndarray, values: np.ndarray, otherwise: int) -> np.ndarray:
        """The value of each position among those that `_numbered` knows. (n,) -> (n,) int64"""
        known = self._numbered[0]
        if len(known) == 0:
            return np.full(len(positions), otherwise, dtype=np.int64)
        place = np.searchsorted(known, positions).clip(max=len(known) - 1)
        return np.where(known[place] == positions, values[place], otherwise)

    def _of_canaries(self, positions: np.ndarray, values: list[int], otherwise: int) -> np.ndarray:
        """What is true of each position's canary; `otherwise` where it is none. (n,) -> (n,) int64"""
        place = self._looked_up(positions, self._numbered[2], -1)  # of no canary: the last of the values
        return np.array([*values, otherwise], dtype=np.int64)[place]

    def one_each(self, positions: np.ndarray) -> np.ndarray:
        """The first of these positions, which are of canaries, that shows each canary, in their order."""
        _, first = np.unique(self.canary_of(positions), return_index=True)
        return positions[np.sort(first)]

    def looked_at(self, positions: np.ndarray, count: int) -> np.ndarray:
        """The samples from whose captions each canary among these positions is generated, and compared with.

        Of planted canaries and duplicates it is the first sample, `count` times; of listed ones, whose samples may
        have captions and pictures of their own, so many of them evenly spread.

        Args:
            positions: of canaries.
            count: generations of each.

        Returns:
            (canaries, count) int64, the canaries in the order of `one_each`.
        """
        places = self._looked_up(self.one_each(positions), self._numbered[2], -1)
        rows = [self.canaries[place].looked_at(count) for place in places.tolist()]
        return np.array(rows, dtype=np.int64).reshape(-1, count)

    def apart(self) -> np.ndarray:
        """What the order of the corpus' ordinary samples leaves out, sorted: planted canaries and reference set."""
        return self._of_corpus(np.sort(np.concatenate([self.planted, self.reference])))

    def _of_corpus(self, positions: np.ndarray) -> np.ndarray:
        """Those of these positions that are not foreign."""
        return positions[positions < self.num_samples - self.num_foreign]

    def some_trained(self, count: int) -> np.ndarray:
        """At most `count` ordinary positions, evenly spread over the corpus."""
        corpus = self.num_samples - self.num_foreign
        step = max(1, corpus // (count + len(self._of_corpus(self._numbered[0]))))
        spread = np.arange(0, corpus, step)
        return spread[self.of(spread) == TRAINED][:count]


def draw_groups(
    counts: Counts,
    seed: int,
    canaries: int,
    reference: int,
    *,
    pictures: Pictures = NO_DUPLICATES,
    repeats: int | Sequence[int] | None = 1,
    sacrificed: int = 0,
    named: Sequence[int] | np.ndarray = (),
    listed: Sequence[Canary] = (),
) -> Groups:
    """Draw canaries and reference set.

    Planted canaries and the reference set come from up to 16 shards, and from samples without a duplicate, so that
    what is held out is not trained on under another key; the canaries do not depend on the reference set's size.
    Canaries that are not planted are the largest groups of duplicates.

    Args:
        counts: samples of each shard, in the order of the corpus.
        canaries, reference: how many, in pictures.
        pictures: the duplicates.
        repeats: how often an epoch sees each planted canary; of several numbers, dealt out in turn, the highest to
            the sacrificed ones. None plants none.
        sacrificed: so many of the canaries, the first ones: of duplicates, those that are most often in the corpus.
        named: positions of samples whose pictures are the sacrificed canaries, in place of `sacrificed`.
        listed: the canaries that a list names, in its order: the first `canaries` of them, or all where that is 0,
            are the canaries, and none is planted. The most frequent ones are sacrificed first.

    Raises:
        ValueError: there are not so many samples or groups of duplicates.
    """
    sizes = np.asarray(counts, dtype=np.int64)
    total, starts = int(sizes.sum()), sizes.cumsum() - sizes
    assert not listed or repeats is None
    first_named = np.asarray(named, dtype=np.int64)
    if not listed:
        first_named = one_a_picture(first_named, pictures, canaries, repeats is not None)
    # what is repeated, and so cannot be held out; each shard's lie between two bounds of the sorted list of all
    repeated = np.union1d(pictures.positions, positions_of(listed)) if listed else pictures.positions
    bounds = np.searchsorted(repeated, np.append(starts, total))
    single = sizes - np.diff(bounds)  # of each shard, samples that are not
    drawn = 0 if repeats is None else canaries
    if drawn + reference >= total or drawn + reference > single.sum():
        raise ValueError(
            f"canaries.count={canaries} and reference.count={reference} leave nothing of the {total} "
            f"samples to train on ({len(repeated)} of them are duplicates{' or listed' if listed else ''}); lower "
            "them or add shards"
        )
    # the shards that are drawn from: as few as hold enough samples that are not repeated, but 16 where there are
    shards = stream_generator(seed, Stream.HOME_SHARDS).permutation(len(sizes))
    enough = int(np.searchsorted(single[shards].cumsum(), drawn + reference)) + 1
    homes = np.sort(shards[: max(_HOME_SHARDS, enough)])
    pool = np.concatenate([np.arange(starts[s], starts[s] + sizes[s]) for s in homes])
    permuted = stream_generator(seed, Stream.GROUPS).permutation(pool)
    permuted = permuted[~(among(permuted, repeated) | np.isin(permuted, first_named))]
    number = sacrificed if len(first_named) == 0 else len(first_named)  # of sacrificed canaries
    if listed:
        chosen, number = of_list(listed, canaries, first_named, sacrificed)
    elif repeats is None:
        chosen = largest_groups(pictures, canaries, first_named)
    else:
        drawn_ones = permuted[: canaries - len(first_named)]
        chosen = plant(np.concatenate([first_named, drawn_ones]), repeats, number)
    if not 0 <= number <= len(chosen):
        more = "" if chosen else "; canaries.count=10 canaries.repeats=100 has some"
        raise ValueError(
            f"canaries.sacrificed must be in [0, {len(chosen)}], the number of canaries, got {number}{more}"
        )
    return Groups(total, tuple(chosen), number, permuted[len(permuted) - reference :], pictures)


def with_foreign(groups: Groups, count: int, repeats: int) -> Groups:
    """The same groups, and as sacrificed canaries `count` foreign pictures, behind the corpus.

    Args:
        groups: of the corpus, without sacrificed canaries.
        count: how many foreign pictures there are.
        repeats: how often an epoch sees each.
    """
    assert groups.num_sacrificed == 0
    first = groups.num_samples
    number = 1 + max((canary.number for canary in groups.canaries), default=-1)
    foreign = (Canary(number + n, FOREIGN, np.array([first + n]), repeats, is_planted=True) for n in range(count))
    return replace(
        groups,
        num_samples=first + count,
        canaries=(*foreign, *groups.canaries),
        num_sacrificed=count,
        num_foreign=count,
    )
