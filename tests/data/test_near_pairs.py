"""The search for near hashes misses none that brute force finds, whatever the distance, the memory and the split."""

from itertools import chain

import numpy as np
import pytest

from memtrain.data import near_pairs as searching
from memtrain.data.components import join
from memtrain.data.covering import BITS, MIRRORED, WORDS, covering, parts
from memtrain.data.near_pairs import Held, OnDisk, count_passes, near_pairs

Pairs = set[tuple[int, int]]


def flipped(hashes: np.ndarray, bits: list[list[int]]) -> np.ndarray:
    """Hashes with these bits changed, a list a row. (N, 4) -> (N, 4)"""
    changed = np.unpackbits(hashes.view(np.uint8), axis=1, bitorder="little")
    for row, places in enumerate(bits):
        changed[row, places] ^= 1
    return np.packbits(changed, axis=1, bitorder="little").view(np.uint64)


def planted_hashes(count: int, seed: int) -> np.ndarray:
    """Random hashes; every fifth is 1 to 60 bits from the one before it, every second of these mirrored. (N, 4)"""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 2**64, (count, WORDS), dtype=np.uint64)
    places = [list(rng.choice(BITS, rng.integers(1, 61), replace=False)) for _ in range(0, count - 1, 5)]
    found[1::5] = flipped(found[: count - 1 : 5], places)
    found[1::10] ^= MIRRORED
    return found


def brute_force(hashes: np.ndarray, distance: int) -> Pairs:
    """All pairs, by a loop over the rows."""
    found = set()
    for row, one in enumerate(hashes[:-1]):
        others = hashes[row + 1 :]
        apart = [np.bitwise_count(others ^ one ^ mirror).sum(1) for mirror in (np.uint64(0), MIRRORED)]
        found |= {(row, row + 1 + int(other)) for other in np.flatnonzero(np.minimum(*apart) <= distance)}
    return found


def pairs_of(hashes, distance: int, *options) -> Pairs:
    return {
        pair
        for left, right in near_pairs(hashes, distance, *options)
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    }


@pytest.mark.parametrize("distance", [0, 1, 15, 16, 31, 47])
def test_the_search_equals_brute_force(distance):
    hashes = planted_hashes(1200, seed=distance)
    wanted = brute_force(hashes, distance)
    assert pairs_of(Held(hashes), distance) == wanted
    assert distance < 15 or len(wanted) > 20


@pytest.mark.parametrize("number", [4, 5, 6, 7, 8, 16])
def test_no_split_misses_what_differs_evenly_in_all_parts(number, monkeypatch):
    """The hardest pairs for 31 bits: each part is at its radius, in whatever bits; 32 are too far."""
    plan = parts(31, number)
    monkeypatch.setattr(searching, "covering", lambda distance, count: plan)
    rng = np.random.default_rng(number)
    bits, spare = [], []
    for _ in range(40):
        # in every part one more than its radius, but in one part
        places = [list(part.start + rng.choice(part.length, part.radius + 1, replace=False)) for part in plan]
        spare.append(places[rng.integers(len(plan))].pop())
        bits.append(list(chain.from_iterable(places)))
    assert {len(places) for places in bits} == {31}
    base = rng.integers(0, 2**64, (40, WORDS), dtype=np.uint64)
    near = flipped(base, bits) ^ np.where(np.arange(40)[:, None] % 2, MIRRORED, np.uint64(0))
    assert pairs_of(Held(np.concatenate([base, near])), 31) == {(row, row + 40) for row in range(40)}
    far = flipped(base, [[*places, bit] for places, bit in zip(bits, spare, strict=True)])
    assert not pairs_of(Held(np.concatenate([base, far])), 31)


def test_bounded_memory_and_parts_of_the_search_find_the_same(tmp_path, monkeypatch):
    """Hashes on disk that do not fit, sorted in several ranges, compared a few at a time, in three processes' parts."""
    monkeypatch.setattr(searching, "_CHUNK", 128)
    monkeypatch.setattr(searching, "_BLOCK", 50)
    hashes = planted_hashes(400, seed=3)
    hashes[200:240] = hashes[199]
    hashes[200:240, 3] ^= np.arange(1, 41, dtype=np.uint64) << np.uint64(8)  # some that lie close
    hashes.tofile(tmp_path / "hashes")
    wanted, total = brute_force(hashes, 31), count_passes(31, 400)
    assert len(wanted) > 800
    steps = [range(0, total // 3), range(total // 3, total // 2), range(total // 2, total)]
    found = [pairs_of(OnDisk(tmp_path / "hashes"), 31, 2000, passes) for passes in steps]
    assert set().union(*found) == wanted
    assert pairs_of(Held(hashes), 31) == wanted


def test_a_crowd_is_joined_without_all_its_pairs(tmp_path):
    """Two crowds that a single hash joins, in a chain, and others that lie beyond; held, and read from a disk."""
    rng = np.random.default_rng(5)
    one, other, far = rng.integers(0, 2**64, (3, 1, WORDS), dtype=np.uint64)
    between = flipped(one, [list(range(0, 256, 9))])  # 29 bits from one
    other = flipped(between, [list(range(1, 256, 9))])  # 29 from between, 58 from one
    groups = []
    for centre, count in ((one, 300), (between, 1), (other, 200), (far, 100)):
        members = np.repeat(centre, count, axis=0)
        bits = [
            [] if n == 0 else [int(bit) for bit in np.flatnonzero([n >> k & 1 for k in range(9)]) * 27 + 6]
            for n in range(count)
        ]
        groups.append(flipped(members, bits))
    hashes = np.concatenate([*groups, planted_hashes(100, seed=6)])
    hashes[::3] ^= MIRRORED
    hashes = hashes[rng.permutation(len(hashes))]
    hashes.tofile(tmp_path / "hashes")
    wanted = brute_force(hashes, 31)
    left, right = np.array(sorted(wanted)).T
    joined = join(np.arange(len(hashes)), left, right)
    for given, memory in ((Held(hashes), None), (OnDisk(tmp_path / "hashes"), 1000)):
        found = pairs_of(given, 31, memory)
        assert found <= wanted and len(found) < len(wanted) / 4
        assert join(np.arange(len(hashes)), *np.array(sorted(found)).T).tolist() == joined.tolist()


def test_more_hashes_take_fewer_and_longer_parts():
    lengths = [covering(31, count)[0].length for count in (10**3, 10**5, 10**7, 10**8)]
    assert lengths == sorted(lengths) and lengths[-1] == 64
    for distance in (0, 7, 31, 47):  # the guarantee: not all parts can be beyond their radius
        assert sum(part.radius + 1 for part in covering(distance, 10**6)) == distance + 1


def test_joining_equals_a_walk_over_the_graph():
    rng = np.random.default_rng(1)
    for edges in (0, 20, 60, 300):
        left, right = rng.integers(0, 100, (2, edges))
        labels = join(np.arange(100), left[: edges // 2], right[: edges // 2])  # in two parts
        labels = join(labels, left[edges // 2 :], right[edges // 2 :])
        component = list(range(100))
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            low, high = sorted((component[one], component[other]))
            component = [low if label == high else label for label in component]
        assert labels.tolist() == component
    walk = np.random.default_rng(2).permutation(10_000)
    assert not join(np.arange(10_000), walk[:-1], walk[1:]).any()
