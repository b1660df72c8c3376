"""Canaries: pictures that are seen often, and watched. Which ones they are, how they are called, and their doses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memtrain.data.pictures import Pictures

log = logging.getLogger(__name__)

DUPLICATES, PLANTED, FOREIGN = "duplicates", "planted", "foreign"  # kinds of canaries that no list names


@dataclass(frozen=True, eq=False)
class Canary:
    """A picture that is seen often, and watched.

    Args:
        number: what it is called.
        kind: `duplicates`, `planted`, `foreign`, or what the user's list says of it.
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


def positions_of(canaries: Sequence[Canary]) -> np.ndarray:
    """The samples of these canaries, one canary after the other. int64"""
    return np.concatenate([np.zeros(0, np.int64), *(canary.positions for canary in canaries)])


def plant(positions: np.ndarray, repeats: int | Sequence[int], sacrificed: int) -> list[Canary]:
    """A planted canary of each of these positions (n,); the first `sacrificed` of them are the sacrificed ones."""
    doses = _dealt(repeats, len(positions), sacrificed)
    return [
        Canary(number, PLANTED, positions[number : number + 1], dose, is_planted=True)
        for number, dose in enumerate(doses.tolist())
    ]


def _dealt(repeats: int | Sequence[int], count: int, sacrificed: int) -> np.ndarray:
    """Doses of planted canaries, in turn; but the sacrificed ones, which come first, get the highest. (count,) int64

    A rule learns from them what memorized samples score, and of a picture that is seen once nothing is memorized.
    """
    doses = np.resize(np.atleast_1d(np.asarray(repeats, dtype=np.int64)), count)
    highest = np.argsort(-doses, kind="stable")[:sacrificed]
    return np.concatenate([doses[highest], np.delete(doses, highest)])


def largest_groups(pictures: Pictures, count: int, first_named: np.ndarray) -> list[Canary]:
    """The largest groups of duplicates as canaries, behind those that are named by one of their samples."""
    chosen = pictures.groups(count, ahead=pictures.of(first_named))
    if len(chosen) < count:
        few = f"the corpus has {len(chosen)} groups of duplicates, not canaries.count={count}"
        if not chosen:
            raise ValueError(f"{few} of them to make canaries of; plant some with canaries.repeats=100")
        log.warning("%s: all of them are canaries", few)
    return [Canary(number, DUPLICATES, group, len(group)) for number, group in enumerate(chosen)]


def of_list(listed: Sequence[Canary], count: int, named: np.ndarray, sacrificed: int) -> tuple[list[Canary], int]:
    """The first `count` listed canaries (0: all), the sacrificed ones first, and how many these are.

    They are those of the samples `named`; or else the most frequent ones, of which most is memorized.
    """
    strangers = int(np.count_nonzero(~np.isin(named, positions_of(listed))))
    if strangers:
        raise ValueError(
            f"canaries.sacrificed_keys names {strangers} sample{'s' * (strangers > 1)} that canaries.file does not "
            "list; name samples that it lists"
        )
    is_named = {canary.number: bool(np.isin(canary.positions, named).any()) for canary in listed}
    count, first = count or len(listed), sum(is_named.values())
    if first > count:
        raise ValueError(f"canaries.sacrificed_keys names {first} canaries, more than canaries.count={count}; raise it")
    if count > len(listed):
        log.warning("canaries.file lists %d canaries, not canaries.count=%d: all of them are taken", len(listed), count)
    chosen = sorted(listed, key=lambda canary: not is_named[canary.number])[:count]  # stable
    if first:
        return chosen, first
    highest = sorted(chosen, key=lambda canary: -canary.repeats)[: max(0, sacrificed)]
    return [*highest, *(canary for canary in chosen if canary not in highest)], sacrificed


def one_a_picture(named: np.ndarray, pictures: Pictures, canaries: int, planted: bool) -> np.ndarray:
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
