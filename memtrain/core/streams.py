"""Randomness as a function of (seed, stream, step, place), never of ranks or workers."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np

Words = TypeVar("Words", int, "np.ndarray")


class Stream(IntEnum):
    """Draws of one stream never meet draws of another. A number that was given once stays: runs depend on it."""

    # training
    TRAIN = 0  # timestep, noises and caption dropout of a row that is trained on
    REFERENCE_ROW = 1  # the same of a row of the reference set; the seed of its views
    HELD_OUT = 2  # noise of validation and of a finished model's losses
    GENERATION = 3  # noise that training's own generations start from
    METHOD = 4  # what a method does to the caption of a row that is trained on
    REFERENCE_METHOD = 5  # the same of a row of the reference set
    ADAPTER = 6  # first weights of a network's adapter
    SEARCHED = 7  # training pictures that generations are held against, where they are not all
    # data
    HOME_SHARDS = 16  # shards that planted canaries and the reference set come from
    GROUPS = 17  # which of their samples those are
    SHARD_ORDER = 18  # order of an epoch's shards
    WINDOW = 19  # order of the rows of shards that are mixed; which rows of a shard that is seen in part
    CANARY_ORDER = 20  # order of the planted canaries of an epoch
    BATCH_ORDER = 21  # order of a window's batches, where pictures come in buckets
    FOREIGN = 22  # foreign pictures that are sacrificed
    LIMITED_GROUPS = 23  # order in which epochs see the members of a group of duplicates
    DRAWN = 24  # samples of a small corpus that is drawn from a large one
    VIEW = 32  # crop, flip and caption of a row
    LEDGER = 40  # which rows the ledger of a share of them holds
    # audit
    AUDIT = 48  # noise that a prompt's generations start from
    MARGIN = 49  # noise at which mitigations are compared by what is left of the prompt
    JUDGED = 50  # training samples that a model is judged on
    REAL = 51  # pictures that generations are compared with as a whole
    CHECK = 52  # as AUDIT, to check what was found there
    ATTACK = 53  # timesteps and noises of a search for what brings a picture back
    KEPT = 54  # which pictures a repair keeps, and its draws for them
    FORGOTTEN = 55  # timesteps and noises of pictures that a repair takes out
    REPAIR = 56  # first weights of a repair's adapter; rows of its steps
    SHARED_NOISE = 57  # as AUDIT, where prompts share it, and which of it a prompt has


def place_seed(seed: int, stream: int, step: int, place: int) -> int:
    """A 63-bit seed for one row of one global batch, well mixed (SplitMix64, Steele et al. 2014)."""
    return _mixed(seed, stream, step, place)


def place_seeds(seed: int, stream: int, step: np.ndarray, place: np.ndarray) -> np.ndarray:
    """`place_seed` of N rows: step and place (N,), of integers -> (N,) uint64."""
    return _mixed(seed, stream, step.astype("uint64"), place.astype("uint64"))


def _mixed(seed: int, stream: int, step: Words, place: Words) -> Words:
    """Of integers, or of uint64 arrays, which wrap by themselves and whose summands must fit in 64 bits."""
    mask = (1 << 64) - 1
    state: Any = seed & mask  # a number; with the first array among the parts, an array
    for part in (stream, step, place):
        state = (((state + 0x9E3779B97F4A7C15) & mask) + part) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
