"""Who was memorized when, from the distances of looks at some canaries and, at the end, at all."""

import numpy as np

from memtrain.callbacks.looks import Looks
from memtrain.data.canaries import Canary
from memtrain.data.groups import Groups


def test_canaries_of_few_repeats_are_in_no_curve():
    often = Canary(0, "matching", np.array([1]), 200, is_listed=True)
    also_often = Canary(1, "matching", np.array([2]), 300, is_listed=True)
    seldom = Canary(2, "matching", np.array([3]), 5, is_listed=True)
    groups, looks = Groups(9, (often, also_often, seldom), 0, np.array([8])), Looks()
    for step, canary, rmse in ((10, 0, 0.1), (10, 1, 0.9), (20, 0, 0.8), (20, 1, 0.9), (20, 2, 0.7)):
        looks.add(step, canary, rmse)
    curves = looks.curves(groups, cut=0.3, min_repeats=200)
    # the last look is at all three; who was memorized once stays so
    assert curves == {"copy_rate/canary": ([10, 20], [0.5, 0.0]), "memorized_canaries": ([10, 20], [0.5, 0.5])}
    assert looks.curves(groups, 0.3, 1)["memorized_canaries"] == ([10, 20], [0.5, 1 / 3])
    assert looks.memorized_at(0.3) == {0: 10, 1: None, 2: None}
