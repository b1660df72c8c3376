import math

import pytest
import torch

from memtrain.core.exclusion import CANARY, REFERENCE, SACRIFICED, TRAINED
from tests.support.observe import observe
from tests.support.rules import BINNED, BINS, agc, calibrated, quantile


class World:
    """Scores whose logarithm is normal; its mean falls over t and drifts, its deviation varies."""

    def __init__(self, seed: int, drift: float):
        self.generator, self.drift = torch.Generator().manual_seed(seed), drift

    def draw(self, count: int, step: int, group: int):
        timesteps = torch.randint(0, 1000, (count,), generator=self.generator)
        t = timesteps / 1000
        mean = 1.4 - 0.3 * t - t**4 + self.drift * torch.sin(step / 150 + 3 * t)
        deviation = 0.3 + 0.07 * torch.sin(6 * t)
        noise = torch.randn(count, generator=self.generator)
        return observe((mean + deviation * noise).exp(), timesteps, torch.zeros(count).long(), group)


@pytest.mark.parametrize("drift", [0.0, 0.2])
def test_calibrated_leaves_out_the_rate_asked_for_in_every_bin(drift):
    """16 reference scores every 4th step over 900 steps, as in the demo: 360 a bin. Four such runs."""
    rates = []
    for seed in range(4):
        world, rule = World(seed, drift), calibrated()
        left_out, seen = torch.zeros(BINS), torch.zeros(BINS)
        for step in range(0, 900, 4):
            rule.update(world.draw(16, step, REFERENCE))
            if step >= 200:
                fresh = world.draw(1000, step, TRAINED)
                bins = fresh.timesteps * BINS // 1000
                seen += torch.bincount(bins, minlength=BINS)
                left_out += torch.bincount(bins[~rule.decide(fresh).keep_mask], minlength=BINS)
        rates.append(left_out / seen)
    rates = torch.stack(rates)
    assert rates.mean(0).min() > 0.003 and rates.mean(0).max() < 0.018  # a tail rests on 3 or 4 scores
    assert 0.006 < rates.mean() < 0.0125


def test_calibrated_learns_from_scored_reference_samples_alone():
    rule, same = calibrated(), calibrated()
    for other in (rule, same):
        other.update(World(1, 0.0).draw(2000, 0, REFERENCE))
    for group in (TRAINED, CANARY, SACRIFICED):
        rule.update(observe([1e6] * 50, group=group))
    rule.update(observe([0.0] * 50, group=REFERENCE, scored=False))
    for name, value in same.state_dict().items():
        assert torch.equal(rule.state_dict()[name], value), name


def test_calibrated_waits_until_it_can_know():
    """A tail of 1 % is not known from fewer than 99 scores; until then everything is kept."""
    rule, world = calibrated(warmup=40), World(2, 0.0)
    for _ in range(6):
        rule.update(world.draw(40, 0, REFERENCE))
        knows = rule.z_scores.count.sum() > 99
        assert rule.decide(observe([1e30])).keep_mask.all() != knows
    assert knows


def test_quantile_follows_the_trained_rows_of_each_bin():
    rule = quantile()
    for _ in range(20):
        rule.update(observe(torch.linspace(1, 2, 100), 950, group=TRAINED))
        rule.update(observe(torch.linspace(10, 20, 100), 50, group=CANARY))
        rule.update(observe([1e6] * 100, 950, group=REFERENCE))
    assert rule.threshold_at(torch.tensor([950])).item() == pytest.approx(1.9, rel=0.01)
    assert rule.threshold_at(torch.tensor([50])).item() == pytest.approx(19.0, rel=0.01)
    assert rule.threshold_at(torch.tensor([550])).item() == math.inf  # not seen yet
    kept = rule.decide(observe([1.8, 2.0, 18.0, 19.5, 1e9], torch.tensor([950, 950, 50, 50, 550]))).keep_mask
    assert kept.tolist() == [True, False, True, False, True]


def test_quantile_of_constant_scores_leaves_out_nobody():
    for constant in (0.0, 0.1234, 7.0):
        rule = quantile()
        rule.update(observe([constant] * 200))
        assert rule.decide(observe([constant] * 3)).keep_mask.all()


def test_a_remembered_score_meets_the_threshold_of_its_own_timestep():
    rule = quantile()
    rule.update(observe([1.0] * 100, 950))
    rule.update(observe([10.0] * 100, 50))
    observed = observe([5.0, 5.0], 50)
    observed.score_timesteps[1] = 950
    assert rule.decide(observed).keep_mask.tolist() == [True, False]


def test_agc_by_hand():
    rule = agc()
    assert rule.decide(observe([0.0], loss=0.0)).keep_mask.all()  # nothing is known yet
    rule.update(observe([0.0] * 3, loss=[1.0, 2.0, 3.0], scored=False))
    rule.update(observe([0.0] * 2, loss=100.0, captioned=False))
    rule.update(observe([0.0] * 2, loss=100.0, group=REFERENCE))
    decay = 0.5 ** (1 / 1000)
    assert rule.threshold_at(torch.tensor([950])).item() == pytest.approx(2 / 1.25)
    rule.update(observe([0.0], loss=4.0, scored=False))
    mean = (6 * decay + 4) / (3 * decay + 1)
    assert rule.threshold_at(torch.tensor([950])).item() == pytest.approx(mean / 1.25)
    decision = rule.decide(observe([0.0] * 3, [950, 950, 50], loss=[1.9, 2.1, 0.0]))
    assert decision.keep_mask.tolist() == [False, True, True]  # the last bin is not known yet
    assert not rule.needs_score and not rule.needs_reference


@pytest.mark.parametrize("make", BINNED)
def test_resumed_equals_uninterrupted(make):
    whole, world = make(), World(3, 0.3)
    parts = [world.draw(200, step, group) for step in range(10) for group in (TRAINED, REFERENCE)]
    for part in parts:
        whole.update(part)
    first, rest = make(), make()
    for part in parts[:7]:
        first.update(part)
    rest.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for part in parts[7:]:
        rest.update(part)
    timesteps = torch.arange(0, 1000, 50)
    threshold = whole.threshold_at(timesteps)
    assert torch.equal(rest.threshold_at(timesteps), threshold) and threshold.isfinite().all()
    assert all(torch.equal(rest.state_dict()[name], value) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("make", BINNED)
def test_a_checkpoint_of_another_rule_is_refused(make):
    with pytest.raises(ValueError, match=r"the checkpoint's exclusion rule has .*resume with the exclusion"):
        make().load_state_dict(make(num_bins=5).state_dict())
    with pytest.raises(ValueError, match="the checkpoint's exclusion rule has no "):
        make().load_state_dict({})


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (quantile, "quantile", 1.0),
        (quantile, "quantile", math.nan),
        (quantile, "num_bins", 0),
        (quantile, "half_life", 3),
        (calibrated, "false_positive_rate", 0.0),
        (calibrated, "half_life", 50),
        (calibrated, "level_half_life", 20),
        (calibrated, "pooling", -1),
        (agc, "ratio", 1.0),
        (agc, "warmup", 0),
        (agc, "start_step", -1),
    ],
)
def test_the_option_that_is_wrong_is_named(make, option, value):
    with pytest.raises(ValueError, match=rf"exclusion\.{option} must be"):
        make(**{option: value})
