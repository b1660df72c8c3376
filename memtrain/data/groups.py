"""Who is a canary and who is held out; all others are trained on as they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from memtrain.core.exclusion import CANARY, REFERENCE, SACRIFICED, TRAINED
from memtrain.core.streams import Stream, place_seed
from memtrain.data.pictures import NO_DUPLICATES, Pictures

Counts = Sequence[int] | np.ndarray  # samples of each shard, in the order of the corpus

# kinds of canaries that no list names
DUPLICATES, PLANTED = "duplicates", "planted"

log = logging.getLogger(__name__)

_HOME_SHARDS = 16  # planted canaries and reference set come from so many shards, so that few must be fetched first


def stream_generator(seed: int, stream: Stream, number: int = 0, part: int = 0) -> np.random.Generator:
    """Draws that depend on these numbers alone."""
    return np.random.default_rng(place_seed(seed, stream, number * 1_000_003 + part, 0))


@dataclass(frozen=True)
class Canary:
    """A picture that is seen often, and watched.

    Args:
        number: what it is called.
        kind: `duplicates`, `planted`, or what the user's list says of it.
        positions: (m,) int64, the samples that show it.
        repeats: its dose, how often an epoch sees it.
        is_planted: whether that is more often than the corpus holds it.
        is_listed: whether its samples are those that a list names, which may differ in caption and picture.
    """

    number: int
    kind: str
    positions: np.ndarray
    repeats: int
    is_planted: bool = False
    is_listed: bool = False

    def looked_at(self, count: int) -> np.ndarray:
        """The samples from whose captions `count` generations are made: of a list, evenly spread. (count,) int64"""
        members = len(self.positions) if self.is_listed else 1
        return self.positions[np.arange(count) * members // max(1, count)]


def _positions(canaries: Sequence[Canary]) -> np.ndarray:
    """The samples of these canaries, one canary after the other. int64"""
    return np.concatenate([np.zeros(0, np.int64), *(canary.positions for canary in canaries)])


@dataclass(frozen=True)
class Groups:
    """A partition of N samples: canaries and reference set; all others are trained on as they are.

    Canaries are planted, each seen many times an epoch; or they are the corpus' own groups of duplicates, or what a
    list names, of which every member is a canary.
    """

    num_samples: int
    canaries: tuple[Canary, ...] = ()
    num_sacrificed: int = 0  # the first so many of the canaries, which no rule may exclude
    reference: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    pictures: Pictures = NO_DUPLICATES

    @cached_property
    def sacrificed(self) -> np.ndarray:
        """Positions of the canaries that no rule may exclude."""
        return _positions(self.canaries[: self.num_sacrificed])

    @cached_property
    def canary(self) -> np.ndarray:
        """Positions of the other canaries."""
        return _positions(self.canaries[self.num_sacrificed :])

    @cached_property
    def planted(self) -> np.ndarray:
        """The canaries that are seen more often than the corpus holds them."""
        return _positions([canary for canary in self.canaries if canary.is_planted])

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
        known = np.concatenate([_positions(self.canaries), self.reference])
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
        """What the order of ordinary samples leaves out, sorted: planted canaries and reference set."""
        return np.sort(np.concatenate([self.planted, self.reference]))

    def some_trained(self, count: int) -> np.ndarray:
        """At most `count` ordinary positions, evenly spread over the corpus."""
        step = max(1, self.num_samples // (count + len(self._numbered[0])))
        spread = np.arange(0, self.num_samples, step)
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

    Raises:
        ValueError: there are not so many samples or groups of duplicates.
    """
    sizes = np.asarray(counts, dtype=np.int64)
    total, starts = int(sizes.sum()), sizes.cumsum() - sizes
    first_named = _one_a_picture(np.asarray(named, dtype=np.int64), pictures, canaries, repeats is not None)
    # here: each shard's duplicates lie between two bounds of the sorted list of all
    bounds = np.searchsorted(pictures.positions, np.append(starts, total))
    single = sizes - np.diff(bounds)  # of each shard, samples without a duplicate
    drawn = 0 if repeats is None else canaries
    if drawn + reference >= total or drawn + reference > single.sum():
        raise ValueError(
            f"canaries.count={canaries} and reference.count={reference} leave nothing of the {total} "
            f"samples to train on ({len(pictures.positions)} of them are duplicates); lower them or add shards"
        )
    # the shards that are drawn from: as few as hold enough samples without a duplicate, but 16 where there are
    shards = stream_generator(seed, Stream.HOME_SHARDS).permutation(len(sizes))
    enough = int(np.searchsorted(single[shards].cumsum(), drawn + reference)) + 1
    homes = np.sort(shards[: max(_HOME_SHARDS, enough)])
    pool = np.concatenate([np.arange(starts[s], starts[s] + sizes[s]) for s in homes])
    permuted = stream_generator(seed, Stream.GROUPS).permutation(pool)
    permuted = permuted[~np.isin(permuted, np.concatenate([pictures.positions, first_named]))]
    number = len(first_named) or sacrificed  # of sacrificed canaries
    if repeats is None:
        chosen = _largest_groups(pictures, canaries, first_named)
    else:
        doses = _dealt(repeats, canaries, number)
        chosen = _planted([*first_named.tolist(), *permuted[: canaries - len(first_named)].tolist()], doses)
    if not 0 <= number <= len(chosen):
        raise ValueError(f"canaries.sacrificed must be in [0, {len(chosen)}], the number of canaries, got {number}")
    return Groups(total, tuple(chosen), number, permuted[len(permuted) - reference :], pictures)


def _planted(positions: Sequence[int], doses: np.ndarray) -> list[Canary]:
    """A planted canary of each position, seen as often as its dose says."""
    return [
        Canary(number, PLANTED, np.array([position]), dose, is_planted=True)
        for number, (position, dose) in enumerate(zip(positions, doses.tolist(), strict=True))
    ]


def _dealt(repeats: int | Sequence[int], count: int, sacrificed: int) -> np.ndarray:
    """Doses of planted canaries, in turn; but the sacrificed ones, which come first, get the highest. (count,) int64

    A rule learns from them what memorized samples score, and of a picture that is seen once nothing is memorized.
    """
    doses = np.resize(np.atleast_1d(np.asarray(repeats, dtype=np.int64)), count)
    highest = np.argsort(-doses, kind="stable")[:sacrificed]
    return np.concatenate([doses[highest], np.delete(doses, highest)])


def _largest_groups(pictures: Pictures, count: int, first_named: np.ndarray) -> list[Canary]:
    """The largest groups of duplicates as canaries, behind those that are named by one of their samples."""
    groups = pictures.groups()
    first = pictures.of(first_named)
    groups.sort(key=lambda group: group[0] not in first)  # stable: the largest first, behind the named ones
    chosen = groups[:count]
    if len(chosen) < count:
        few = f"the corpus has {len(chosen)} groups of duplicates, not canaries.count={count}"
        if not chosen:
            raise ValueError(f"{few} of them to make canaries of; plant some with canaries.repeats=100")
        log.warning("%s: all of them are canaries", few)
    return [Canary(number, DUPLICATES, group, len(group)) for number, group in enumerate(chosen)]


def _one_a_picture(named: np.ndarray, pictures: Pictures, canaries: int, planted: bool) -> np.ndarray:
    """The first named sample of each picture. Raises ValueError where they cannot all be sacrificed canaries."""
    _, first = np.unique(pictures.of(named), return_index=True)
    named = named[np.sort(first)]
    if len(named) > canaries:
        raise ValueError(
            f"canaries.sacrificed_keys names {len(named)} pictures, more than canaries.count={canaries}; raise it"
        )
    single = int(np.count_nonzero(~np.isin(named, pictures.positions)))
    if single and not planted:
        raise ValueError(
            f"canaries.sacrificed_keys names {single} sample{'s' * (single > 1)} without a duplicate, and with "
            "canaries.repeats=null the canaries are groups of duplicates; name one of these, or plant canaries with "
            "canaries.repeats=100"
        )
    return named
