from collections import Counter

import numpy as np
import pytest

from memtrain.data.order import EpochOrder, GlobalBatchSampler, draw_groups


def batches(order, batch_size, accumulate=1, world=1, steps=6, first=0):
    """Positions of each global batch, put together from what the ranks get."""
    ranks = [list(GlobalBatchSampler(order, batch_size, accumulate, r, world, steps, first)) for r in range(world)]
    whole = []
    for step in range(steps - first):
        rows = [row for micro in range(accumulate) for rank in ranks for row in rank[step * accumulate + micro]]
        assert [place for place, _ in rows] == list(range(batch_size * accumulate * world))
        whole.append([index for _, index in rows])
    return whole


def order(seed=0, num_samples=50, canaries=3, repeats=5, reference=7):
    return EpochOrder(draw_groups(num_samples, seed, canaries, reference), repeats, seed)


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), [(2, 2, 2), (4, 1, 2), (1, 8, 1), (2, 1, 4)])
def test_global_batches_do_not_depend_on_how_they_are_cut(batch_size, accumulate, world):
    assert batches(order(), batch_size, accumulate, world) == batches(order(), 8)


def test_a_later_start_continues_the_sequence():
    assert batches(order(), 8, steps=12, first=7) == batches(order(), 8, steps=12)[7:]
    sampler = GlobalBatchSampler(order(), 8, 2, 0, 1, num_steps=12, first_step=7)
    assert len(sampler) == 24  # the whole run's: the trainer counts from the start


def test_an_epoch_sees_each_sample_once_and_canaries_repeatedly():
    o = order()
    first, second = o.epoch(0), o.epoch(1)
    expected = Counter(o.groups.train.tolist()) + Counter({int(c): 5 for c in o.groups.canary})
    assert Counter(first.tolist()) == Counter(second.tolist()) == expected
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, order(seed=1).epoch(0))


def test_groups_are_a_partition_and_canaries_stay_when_the_reference_grows():
    small, large = draw_groups(50, 0, 5, 4), draw_groups(50, 0, 5, 20)
    assert sorted(np.concatenate([small.train, small.canary, small.reference])) == list(range(50))
    assert np.array_equal(small.canary, large.canary)
    assert (small.of_samples()[small.canary] == 1).all() and (small.of_samples() == 2).sum() == 4


def test_a_corpus_smaller_than_a_batch_is_named():
    with pytest.raises(ValueError, match=r"55 samples, fewer than one global batch of 64.*batch_size=8"):
        GlobalBatchSampler(order(), 8, 4, 0, 2, num_steps=1)


def test_groups_that_leave_nothing_are_named():
    with pytest.raises(ValueError, match=r"canaries\.count=30 and reference\.count=20"):
        draw_groups(50, 0, 30, 20)
