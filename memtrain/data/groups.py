"""Who is a canary and who is held out; all others are trained on as they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memtrain.core.exclusion import CANARY, REFERENCE, SACRIFICED, TRAINED
from memtrain.core.streams import Stream, place_seed
from memtrain.data.pictures import NO_DUPLICATES, Pictures

Counts = Sequence[int] | np.ndarray  # samples of each shard, in the order of the corpus

log = logging.getLogger(__name__)

_HOME_SHARDS = 16  # planted canaries and reference set come from so many shards, so that few must be fetched first


def stream_generator(seed: int, stream: Stream, number: int = 0, part: int = 0) -> np.random.Generator:
    """Draws that depend on these numbers alone."""
    return np.random.default_rng(place_seed(seed, stream, number * 1_000_003 + part, 0))


@dataclass(frozen=True)
class Groups:
    """A partition of N samples: positions of canaries and reference set; all others are trained on as they are.

    Canaries are planted, each seen many times an epoch; or they are the corpus' own groups of duplicates, of which
    every member is a canary.
    """

    num_samples: int
    canary: np.ndarray
    reference: np.ndarray
    sacrificed: np.ndarray  # canaries that no rule may exclude; `canary` holds the others
    pictures: Pictures = NO_DUPLICATES
    are_planted: bool = True

    @property
    def planted(self) -> np.ndarray:
        """The canaries that are seen more often than the corpus holds them."""
        return np.concatenate([self.sacrificed, self.canary]) if self.are_planted else np.zeros(0, np.int64)

    def of(self, positions: np.ndarray) -> np.ndarray:
        """Group of each position, core.exclusion's TRAINED, CANARY, REFERENCE or SACRIFICED. int64"""
        known, number = self._numbered
        if len(known) == 0:
            return np.full(len(positions), TRAINED, dtype=np.int64)
        place = np.searchsorted(known, positions).clip(max=len(known) - 1)
        return np.where(known[place] == positions, number[place], TRAINED)

    @cached_property
    def _numbered(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions of all but the ordinary samples, sorted, and the group of each."""
        parts = ((self.canary, CANARY), (self.reference, REFERENCE), (self.sacrificed, SACRIFICED))
        known = np.concatenate([positions for positions, _ in parts])
        number = np.concatenate([np.full(len(positions), group) for positions, group in parts])
        order = np.argsort(known, kind="stable")
        return known[order], number[order]

    def one_each(self, positions: np.ndarray) -> np.ndarray:
        """The first of these positions that shows each picture, in their order."""
        _, first = np.unique(self.pictures.of(positions), return_index=True)
        return positions[np.sort(first)]

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
    planted: bool = True,
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
        planted: whether canaries are planted.
        sacrificed: so many of the canaries, the first ones: of duplicates, those that are most often in the corpus.
        named: positions of samples whose pictures are the sacrificed canaries, in place of `sacrificed`.

    Raises:
        ValueError: there are not so many samples or groups of duplicates.
    """
    sizes = np.asarray(counts, dtype=np.int64)
    total, starts = int(sizes.sum()), sizes.cumsum() - sizes
    first_named = _one_a_picture(np.asarray(named, dtype=np.int64), pictures, canaries, planted)
    # here: each shard's duplicates lie between two bounds of the sorted list of all
    bounds = np.searchsorted(pictures.positions, np.append(starts, total))
    single = sizes - np.diff(bounds)  # of each shard, samples without a duplicate
    drawn = canaries if planted else 0
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
    # the pictures that are canaries, those that are named first
    if planted:
        chosen = [np.array([position]) for position in [*first_named, *permuted[: canaries - len(first_named)]]]
    else:
        groups = pictures.groups()
        first = pictures.of(first_named)
        groups.sort(key=lambda group: group[0] not in first)  # stable: the largest first, behind the named ones
        chosen = groups[:canaries]
        if len(chosen) < canaries:
            few = f"the corpus has {len(chosen)} groups of duplicates, not canaries.count={canaries}"
            if not chosen:
                raise ValueError(f"{few} of them to make canaries of; plant some with canaries.repeats=100")
            log.warning("%s: all of them are canaries", few)
    sacrificed = len(first_named) or sacrificed
    if not 0 <= sacrificed <= len(chosen):
        raise ValueError(f"canaries.sacrificed must be in [0, {len(chosen)}], the number of canaries, got {sacrificed}")
    none = np.zeros(0, np.int64)
    return Groups(
        total,
        canary=np.concatenate([none, *chosen[sacrificed:]]),
        reference=permuted[len(permuted) - reference :],
        sacrificed=np.concatenate([none, *chosen[:sacrificed]]),
        pictures=pictures,
        are_planted=planted,
    )


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
