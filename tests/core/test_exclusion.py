import math

import pytest
import torch

from memtrain.core.exclusion import (
    CANARY,
    REFERENCE,
    TRAINED,
    Evidence,
    FixedThreshold,
    KeepAll,
    NormalizedThreshold,
    Observations,
)


def observe(score, timesteps=None, index=None, group=TRAINED, scored=None) -> Observations:
    score = torch.as_tensor(score, dtype=torch.float32)
    n = len(score)
    fill = lambda value: torch.full((n,), value)  # noqa: E731
    return Observations(
        sample_index=torch.arange(n) if index is None else torch.as_tensor(index),
        timesteps=fill(900) if timesteps is None else torch.as_tensor(timesteps),
        score=score,
        loss=torch.ones(n),
        scored=fill(True) if scored is None else torch.as_tensor(scored),
        group=fill(group),
    )


def evidence(**options) -> Evidence:
    defaults = dict(enter=1.0, leave=0.5, memory=0.8, min_timestep=0.7, num_bins=10, half_life=1000, warmup=20)
    rule = Evidence(**(defaults | options))
    rule.setup(num_samples=100, latent_numel=16, num_timesteps=1000)
    return rule


def warm(rule: Evidence, seed: int = 0, mean: float = 0.0) -> None:
    """Reference scores whose logarithm is standard normal, in every bin."""
    log_score = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) + mean
    rule.update(observe(log_score.exp(), torch.arange(2000) % 1000, torch.full((2000,), 99), REFERENCE))


def test_fixed_leaves_out_at_and_above_the_threshold():
    decision = FixedThreshold(2.0).decide(observe([1.99, 2.0, 3.0]))
    assert decision.keep_mask.tolist() == [True, False, False] and decision.threshold.tolist() == [2, 2, 2]


def test_an_infinite_threshold_keeps_what_none_keeps():
    observed = observe([0.0, 5.0, 1e30])
    for rule in (FixedThreshold(math.inf), NormalizedThreshold(math.inf)):
        rule.setup(10, 16, 1000)
        assert torch.equal(rule.decide(observed).keep_mask, KeepAll().decide(observed).keep_mask)


def test_normalized_carries_over_between_resolutions():
    small, large = NormalizedThreshold(0.5), NormalizedThreshold(0.5)
    small.setup(10, 4 * 8 * 8, 1000)
    large.setup(10, 4 * 16 * 16, 1000)
    per_element = torch.tensor([0.1, 0.4, 0.6])
    kept = small.decide(observe(per_element * 16)).keep_mask
    assert torch.equal(kept, large.decide(observe(per_element * 32)).keep_mask)
    assert kept.tolist() == [True, True, False]


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_threshold_that_means_nothing_is_refused(value):
    with pytest.raises(ValueError, match=r"exclusion\.threshold must be > 0, got .*exclusion=none"):
        FixedThreshold(value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("enter", -1), ("leave", 2.0), ("memory", 1.0), ("min_timestep", 1.0), ("num_bins", 0), ("warmup", 0)],
)
def test_evidence_names_the_option_that_is_wrong(option, value):
    with pytest.raises(ValueError, match=rf"exclusion\.{option}"):
        evidence(**{option: value})


def test_evidence_excludes_nobody_before_the_reference_is_known():
    rule = evidence()
    assert rule.decide(observe([1e6])).keep_mask.all()
    rule.update(observe([1e6]))
    assert not rule.excluded.any()


def test_evidence_enters_above_stays_at_every_timestep_and_leaves_below():
    rule = evidence()
    warm(rule)
    high, ordinary = math.exp(3.0), math.exp(0.0)
    steps = 0
    while not rule.excluded[5]:
        rule.update(observe([high], index=[5]))
        steps += 1
    assert steps == 2  # 1 - 0.8^k of z = 3 reaches 1 on the second visit
    at_low_noise = observe([ordinary], timesteps=[100], index=[5])
    assert not rule.decide(at_low_noise).keep_mask.item()  # out at every timestep, and such a visit changes nothing
    rule.update(at_low_noise)
    assert rule.excluded[5]
    visits = 0
    while rule.excluded[5]:
        rule.update(observe([ordinary], index=[5]))
        visits += 1
    assert visits == math.ceil(math.log(0.5 / 1.08) / math.log(0.8))  # slow to leave: below `leave`, not `enter`
    assert rule.decide(at_low_noise).keep_mask.item()


def test_evidence_of_ordinary_samples_stays_rare():
    """Standard normal z-scores: the moving average has deviation sqrt((1-m)/(1+m)) = 1/3, so 1 is 3 sigma."""
    rule = evidence()
    warm(rule)
    generator = torch.Generator().manual_seed(1)
    excluded = 0.0
    for _ in range(200):
        score = torch.randn(99, generator=generator).exp()
        rule.update(observe(score))
        excluded += rule.excluded[:99].float().mean().item() / 200
    assert excluded < 0.02


def test_evidence_does_not_depend_on_the_order_within_a_step():
    rules = evidence(), evidence()
    for rule, direction in zip(rules, (1, -1), strict=True):
        warm(rule)
        rule.update(observe([1.0, 5.0, 9.0, 2.0][::direction], index=[1, 2, 1, 2][::direction]))
    torch.testing.assert_close(rules[0].evidence, rules[1].evidence)


def test_unscored_rows_enter_no_statistic():
    rule, same = evidence(), evidence()
    warm(rule)
    warm(same)
    rule.update(observe([0.0, 0.0], index=[1, 2], scored=[False, False]))
    rule.update(observe([0.0], index=[99], group=REFERENCE, scored=[False]))
    for name, value in same.state_dict().items():
        assert torch.equal(rule.state_dict()[name], value), name


def test_evidence_state_comes_back_and_another_corpus_is_refused():
    rule = evidence()
    warm(rule)
    rule.update(observe([50.0] * 3, index=[3, 3, 4], group=CANARY))
    other = evidence()
    other.load_state_dict(rule.state_dict())
    observed = observe([3.0, 3.0, 3.0], index=[3, 4, 5])
    assert torch.equal(other.decide(observed).keep_mask, rule.decide(observed).keep_mask)
    smaller = Evidence(1.0, 0.5, 0.8, 0.7, 10, 100, 20)
    smaller.setup(50, 16, 1000)
    with pytest.raises(ValueError, match="100 samples, this corpus has 50"):
        smaller.load_state_dict(rule.state_dict())
