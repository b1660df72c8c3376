import math

import pytest
import torch

from memtrain.core.exclusion import FixedThreshold, KeepAll, NormalizedThreshold
from tests.support.observe import observe


def test_fixed_leaves_out_at_and_above_the_threshold():
    decision = FixedThreshold(2.0).decide(observe([1.99, 2.0, 3.0]))
    assert decision.keep_mask.tolist() == [True, False, False] and decision.threshold.tolist() == [2, 2, 2]


def test_an_infinite_threshold_keeps_what_none_keeps():
    observed = observe([0.0, 5.0, 1e30])
    for rule in (FixedThreshold(math.inf), NormalizedThreshold(math.inf)):
        rule.setup(10, 1000)
        assert torch.equal(rule.decide(observed).keep_mask, KeepAll().decide(observed).keep_mask)


def test_normalized_carries_over_between_resolutions():
    rule, per_element = NormalizedThreshold(0.5), torch.tensor([0.1, 0.4, 0.6])
    for side in (8, 16):
        numel = 4 * side * side
        decision = rule.decide(observe(per_element * math.sqrt(numel), latent_numel=numel))
        assert decision.keep_mask.tolist() == [True, True, False]


def test_normalized_goes_by_each_samples_own_latents():
    decision = NormalizedThreshold(0.5).decide(observe([15.0, 15.0], latent_numel=[4 * 16 * 16, 4 * 12 * 16]))
    assert decision.keep_mask.tolist() == [True, False]  # 15 / 32 and 15 / 27.7


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_threshold_that_means_nothing_is_refused(value):
    with pytest.raises(ValueError, match=r"exclusion\.threshold must be > 0, got .*exclusion=none"):
        FixedThreshold(value)


def test_a_start_before_the_first_step_is_refused():
    with pytest.raises(ValueError, match=r"exclusion\.start_step must be >= 0, got -1"):
        NormalizedThreshold(1.0, start_step=-1)
