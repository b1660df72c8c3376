"""Where randomness comes from: the same in every version, since a run that is resumed draws on."""

import numpy as np
import pytest

from memtrain.core.streams import Stream, place_seed, place_seeds

NUMBERS = {
    "TRAIN": 0, "REFERENCE_ROW": 1, "HELD_OUT": 2, "GENERATION": 3, "METHOD": 4, "REFERENCE_METHOD": 5,
    "ADAPTER": 6, "SEARCHED": 7,
    "HOME_SHARDS": 16, "GROUPS": 17, "SHARD_ORDER": 18, "WINDOW": 19, "CANARY_ORDER": 20, "BATCH_ORDER": 21,
    "FOREIGN": 22, "LIMITED_GROUPS": 23, "DRAWN": 24,
    "VIEW": 32, "LEDGER": 40, "AUDIT": 48, "MARGIN": 49, "JUDGED": 50, "REAL": 51, "CHECK": 52, "ATTACK": 53,
    "KEPT": 54, "FORGOTTEN": 55, "REPAIR": 56, "SHARED_NOISE": 57,
}  # fmt: skip


def test_streams_are_distinct_and_keep_their_numbers():
    assert {name: int(stream) for name, stream in Stream.__members__.items()} == NUMBERS  # aliases included
    assert len(set(NUMBERS.values())) == len(NUMBERS)


@pytest.mark.parametrize(
    ("seed", "stream", "step", "place", "expected"),
    [
        (0, Stream.TRAIN, 0, 0, 1279368494785126216),
        (7, Stream.LEDGER, 5, 11, 4866065664936996179),
        (-3, Stream.AUDIT, 9223372036854775813, 3, 7021496023341959108),
        (1099511627776, Stream.CHECK, 1000000, 10000000000, 7941252539135176152),
    ],
)
def test_seeds_are_those_of_earlier_versions(seed, stream, step, place, expected):
    assert place_seed(seed, stream, step, place) == expected


@pytest.mark.parametrize("seed", [0, 7, -3, 2**64 - 1, 2**80 + 1])
@pytest.mark.parametrize("stream", [Stream.TRAIN, Stream.CHECK])
def test_seeds_of_many_rows_are_those_of_each(seed, stream):
    """At the ends of 64 bits too, where sums wrap."""
    draw = np.random.default_rng(0)
    step = np.append(draw.integers(0, 10**6, 500), [0, 2**63 - 1, 2**62])
    place = np.append(draw.integers(0, 2**63, 500), [2**63 - 1, 0, 2**63 - 1])
    each = [place_seed(seed, stream, s, p) for s, p in zip(step.tolist(), place.tolist(), strict=True)]
    many = place_seeds(seed, stream, step, place)
    assert many.dtype == np.uint64 and many.tolist() == each and len(set(each)) == len(each)
    assert len(place_seeds(seed, stream, step[:0], place[:0])) == 0
