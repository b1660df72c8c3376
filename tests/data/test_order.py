from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.data.groups import draw_groups
from memtrain.data.order import BucketedOrder, EpochOrder, GlobalBatchSampler
from memtrain.data.pictures import Pictures

COUNTS = (13, 0, 20, 1, 16)  # 50 samples in unequal shards, one of them empty


def order(seed=0, counts=COUNTS, canaries=3, repeats=5, reference=7, weights=None, mix_shards=2):
    groups = draw_groups(counts, seed, canaries, reference, repeats=repeats)
    return EpochOrder(counts, groups, seed, weights, mix_shards)


def batches(order, batch_size, accumulate=1, world=1, steps=6, first=0, consumed=None):
    """Positions of each global batch, put together from what the ranks get."""
    size = batch_size * accumulate * world
    consumed = first * size if consumed is None else consumed
    ranks = [
        list(GlobalBatchSampler(order, batch_size, accumulate, r, world, steps, first, consumed)) for r in range(world)
    ]
    whole = []
    for step in range(steps - first):
        rows = [row for micro in range(accumulate) for rank in ranks for row in rank[step * accumulate + micro]]
        assert [(s, place) for s, place, _ in rows] == [(first + step, place) for place in range(size)]
        whole.append([index for _, _, index in rows])
    return whole


def epochs(order, count, size=5):
    """The first `count` epochs, each as a list of positions."""
    rows = np.concatenate(batches(order, size, steps=-(-count * len(order) // size)))
    return [rows[i * len(order) : (i + 1) * len(order)].tolist() for i in range(count)]


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), [(2, 2, 2), (4, 1, 2), (1, 8, 1), (2, 1, 4)])
def test_global_batches_do_not_depend_on_how_they_are_cut(batch_size, accumulate, world):
    assert batches(order(), batch_size, accumulate, world, steps=20) == batches(order(), 8, steps=20)


@given(first=st.integers(0, 40))
@settings(max_examples=20)
def test_a_later_start_continues_the_sequence(first):
    assert batches(order(), 8, steps=41, first=first) == batches(order(), 8, steps=41)[first:]
    sampler = GlobalBatchSampler(order(), 8, 2, 0, 1, num_steps=12, first_step=7)
    assert len(sampler) == 24  # the whole run's: the trainer counts from the start


def test_another_global_batch_size_goes_on_where_the_rows_were_consumed():
    rows = np.concatenate(batches(order(), 8, steps=20)).tolist()
    later = np.concatenate(batches(order(), 4, steps=25, first=5, consumed=40)).tolist()
    assert later == rows[40:120]


def test_an_epoch_sees_each_sample_once_and_canaries_repeatedly():
    o = order()
    first, second = epochs(o, 2)
    trained = set(range(50)) - set(o.groups.apart().tolist())
    expected = Counter(trained) + Counter({int(c): 5 for c in o.groups.canary})
    assert Counter(first) == Counter(second) == expected
    assert first != second and first != epochs(order(seed=1), 1)[0]


def test_shards_are_permuted_each_epoch_and_few_are_open_at_a_time():
    o = order(counts=(10,) * 12, canaries=0, reference=0, mix_shards=3)
    first, second = epochs(o, 2)
    for epoch in (first, second):
        windows = [{row // 10 for row in epoch[i : i + 30]} for i in range(0, 120, 30)]
        assert all(len(window) == 3 for window in windows) and len(set.union(*windows)) == 12
        assert any(epoch[i] // 10 != epoch[i + 1] // 10 for i in range(5))  # mixed, not one after the other
    assert [row // 10 for row in first[::30]] != [row // 10 for row in second[::30]]


def test_canaries_are_spread_over_the_epoch():
    o = order(counts=(100,) * 8, canaries=2, repeats=40, reference=0, mix_shards=2)
    (epoch,) = epochs(o, 1)
    quarters = np.isin(np.array(epoch), o.groups.canary).reshape(2, -1).sum(1)
    assert quarters.tolist() == [40, 40]


def test_weights_say_how_often_an_epoch_sees_a_sample():
    o = order(counts=(10, 10, 10), canaries=0, reference=0, weights=(2, 1, 0.5))
    first, second = epochs(o, 2)
    assert len(o) == 35
    for epoch in (first, second):
        seen = Counter(epoch)
        assert all(seen[i] == 2 for i in range(10)) and all(seen[i] == 1 for i in range(10, 20))
        assert sum(seen[i] for i in range(20, 30)) == 5 and max(seen[i] for i in range(20, 30)) == 1
    assert set(first) != set(second)  # another half


def test_the_open_and_the_next_shards_are_announced():
    told = []
    o = order(counts=(4,) * 6, canaries=0, reference=0, mix_shards=2)
    list(GlobalBatchSampler(o, 4, 1, 0, 1, num_steps=12, upcoming=told.append))
    windows = o.windows(0) + o.windows(1) + o.windows(2)
    assert told == [a.shards + b.shards for a, b in pairwise(windows[:7])]


def test_groups_are_a_partition_and_canaries_stay_when_the_reference_grows():
    small, large = draw_groups(COUNTS, 0, 5, 4), draw_groups(COUNTS, 0, 5, 20)
    assert len(set(small.apart().tolist())) == 9 and np.array_equal(small.canary, large.canary)
    groups = small.of(np.arange(50))
    assert (groups[small.canary] == 1).all() and (groups == 2).sum() == 4 and (groups == 0).sum() == 41
    trained = small.some_trained(10)
    assert len(trained) == 10 and not set(trained.tolist()) & set(small.apart().tolist())


def test_canaries_and_reference_set_come_from_few_shards():
    groups = draw_groups((1000,) * 400, 0, 20, 300)
    assert len(set((groups.apart() // 1000).tolist())) <= 16
    assert len(draw_groups((2,) * 400, 0, 20, 300).apart()) == 320  # more where 16 do not suffice


def test_a_corpus_smaller_than_a_batch_is_named():
    with pytest.raises(ValueError, match=r"55 samples, fewer than one global batch of 64.*batch_size=8"):
        GlobalBatchSampler(order(), 8, 4, 0, 2, num_steps=1)


def test_groups_that_leave_nothing_are_named():
    with pytest.raises(ValueError, match=r"canaries\.count=30 and reference\.count=20"):
        draw_groups(COUNTS, 0, 30, 20)


# ---- aspect-ratio buckets


def bucketed(seed=0, counts=COUNTS, repeats=5, mix_shards=2):
    """Every third sample of a shard is in bucket 1, every seventh in bucket 2."""
    groups = draw_groups(counts, seed, 3, 7, repeats=repeats)
    buckets = [np.array([2 if i % 7 == 6 else i % 3 == 2 for i in range(count)], dtype=np.int16) for count in counts]
    return BucketedOrder(counts, groups, seed, [1.0] * len(counts), mix_shards, buckets.__getitem__)


def test_a_global_batch_holds_one_bucket_and_an_epoch_loses_less_than_a_batch_of_each():
    o, size = bucketed(), 4
    steps = o.batches_of_epoch(size)
    seen = batches(o, size, steps=2 * steps)
    assert all(len(set(o.bucket_of(np.array(batch)).tolist())) == 1 for batch in seen)
    trained = Counter(set(range(50)) - set(o.groups.apart().tolist())) + Counter(o.groups.canary.tolist() * 5)
    for epoch in (seen[:steps], seen[steps:]):
        left = trained - Counter(row for batch in epoch for row in batch)
        assert not Counter(row for batch in epoch for row in batch) - trained
        assert all(number < size for number in Counter(o.bucket_of(np.array(list(left.elements()))).tolist()).values())
    assert seen[:steps] != seen[steps:]


@given(first=st.integers(0, 40))
@settings(max_examples=20)
def test_buckets_too_are_continued_at_any_step(first):
    assert batches(bucketed(), 4, steps=41, first=first) == batches(bucketed(), 4, steps=41)[first:]
    assert batches(bucketed(), 2, 1, 2, steps=20) == batches(bucketed(), 4, steps=20)


def test_buckets_that_fill_no_batch_are_named():
    o = bucketed(counts=(8, 4))
    with pytest.raises(ValueError, match=r"no aspect-ratio bucket has a global batch of 18"):
        next(o.global_batches(18, 0, print))


# ---- at most so many visits of a group of duplicates


@st.composite
def limited_orders(draw):
    """An order with a limit and the same without one: (limited, unlimited, max_visits); planted canaries or not."""
    counts = draw(st.lists(st.integers(0, 12), min_size=2, max_size=5).filter(lambda counts: sum(counts) >= 12))
    total, seed = sum(counts), draw(st.integers(0, 3))
    positions = draw(st.sets(st.integers(0, total - 1), max_size=total - 6).map(sorted))
    labels = draw(st.lists(st.integers(0, 2), min_size=len(positions), max_size=len(positions)))
    pictures = Pictures.labelled(np.array(positions, dtype=np.int64), np.array(labels, dtype=np.int64))
    weights = draw(st.lists(st.integers(1, 2), min_size=len(counts), max_size=len(counts)))
    named = draw(st.lists(st.sampled_from(positions or [0]), max_size=1))  # a canary that may have duplicates
    doses = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    groups = draw_groups(counts, seed, 2, 2, pictures=pictures, repeats=doses, named=named)
    max_visits, rest = draw(st.integers(1, 5)), (seed, weights, draw(st.integers(1, 3)))
    return EpochOrder(counts, groups, *rest, max_visits), EpochOrder(counts, groups, *rest), max_visits


@given(limited_orders())
@settings(max_examples=60, deadline=None)
def test_an_epoch_sees_no_picture_more_often_than_is_allowed(orders):
    limited, unlimited, max_visits = orders
    pictures = limited.groups.pictures
    (wanted,) = epochs(unlimited, 1, size=1)
    wanted = Counter(pictures.of(np.array(wanted)).tolist())
    groups = limited.groups  # in which it is drawn as planted, and comes first
    free = Counter(dict.fromkeys(pictures.of(groups.sacrificed).tolist(), groups.doses[0]))
    for epoch in epochs(limited, 3, size=1):
        seen = Counter(pictures.of(np.array(epoch)).tolist())
        # by hand: what has duplicates or is planted, as often as without a limit, but never more often than it allows;
        # only the sacrificed canary is, and its duplicates are not seen beside it
        repeated = {*pictures.first.tolist(), *pictures.of(limited.groups.planted).tolist()}
        assert seen == Counter(
            {p: free[p] + min(times - free[p], max(0, max_visits - free[p])) if p in repeated else times
             for p, times in wanted.items()}
        )  # fmt: skip
        for window in limited.windows(0):
            assert set(limited._shard_of(window.limited).tolist()) <= set(window.shards)


def test_which_members_of_a_group_are_seen_goes_round():
    pictures = Pictures.labelled(np.array([0, 5, 13, 30, 40, 2, 20]), np.array([0, 0, 0, 0, 0, 1, 1]))
    groups = draw_groups(COUNTS, 0, 0, 3, pictures=pictures)
    o = EpochOrder(COUNTS, groups, 0, mix_shards=2, max_visits=2)
    assert len(o) == 50 - 3 - (5 - 2)  # the pair is no more than is allowed
    seen = Counter(row for epoch in epochs(o, 5) for row in epoch if row in (0, 5, 13, 30, 40))
    assert seen == Counter({0: 2, 5: 2, 13: 2, 30: 2, 40: 2})
    rows = np.concatenate(batches(o, 8, steps=30)).tolist()
    assert np.concatenate(batches(o, 2, 2, 2, steps=30)).tolist() == rows
    assert np.concatenate(batches(o, 4, steps=60, first=26, consumed=104)).tolist() == rows[104:240]


def test_a_sacrificed_group_is_seen_as_often_as_the_corpus_holds_it():
    pictures = Pictures.labelled(np.array([0, 5, 13, 30, 40, 2, 20, 21]), np.array([0, 0, 0, 0, 0, 1, 1, 1]))
    groups = draw_groups(COUNTS, 0, 2, 3, pictures=pictures, repeats=None, sacrificed=1)
    assert groups.sacrificed.tolist() == [0, 5, 13, 30, 40]
    [epoch] = epochs(EpochOrder(COUNTS, groups, 0, mix_shards=2, max_visits=1), 1)
    seen = Counter(epoch)
    assert [seen[row] for row in (0, 5, 13, 30, 40)] == [1] * 5 and seen[2] + seen[20] + seen[21] == 1


def test_buckets_are_continued_where_groups_are_limited():
    def made():
        o = bucketed()
        pictures = Pictures.labelled(np.arange(4, 40, 3), np.arange(12) % 2)
        groups = draw_groups(COUNTS, 0, 3, 7, pictures=pictures, repeats=5)
        return BucketedOrder(COUNTS, groups, 0, [1.0] * len(COUNTS), 2, o.buckets, max_visits=2)

    whole = batches(made(), 3, steps=60)
    assert len({made().batches_of_epoch(3, epoch) for epoch in range(6)}) > 1  # members lie in several buckets
    for first in range(60):
        assert batches(made(), 3, steps=60, first=first) == whole[first:]
    lengths = [made().batches_of_epoch(3, epoch) for epoch in range(3)]
    visits = Counter(row for batch in whole[: lengths[0]] for row in batch)
    of_picture = Counter(made().groups.pictures.of(np.array(list(visits.elements()))).tolist())
    assert max(of_picture[4], of_picture[7]) <= 2


@pytest.mark.parametrize(("max_visits", "weights", "said"), [(0, None, ">= 1, got 0"), (1, (1, 1, 0.5, 1, 1), "whole")])
def test_a_limit_that_makes_no_sense_is_named(max_visits, weights, said):
    groups = draw_groups(COUNTS, 0, 0, 3)
    with pytest.raises(ValueError, match=rf"data\.max_visits_per_group .*{said}"):
        EpochOrder(COUNTS, groups, 0, weights, max_visits=max_visits)
