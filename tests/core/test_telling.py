"""Scores that say nothing, not finite or exactly 0, enter no rule; a rule that could never warm up is refused."""

import math

import pytest
import torch

from memtrain.core.binned_rules import IetAgc, Quantile
from memtrain.core.evidence import ZScoreEvidence
from memtrain.core.exclusion import REFERENCE, SACRIFICED, TRAINED
from memtrain.core.quantiles import RunningQuantiles
from memtrain.core.statistics import BinnedMoments, most_remembered
from memtrain.core.trend import Trend
from tests.support import rules
from tests.support.observe import observe

RULES = (*rules.BINNED, *rules.EVIDENCE)


def warm(rule) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        for group in (REFERENCE, TRAINED, SACRIFICED):
            score = (0.3 * torch.randn(40, generator=generator)).exp()
            timesteps = torch.randint(0, 1000, (40,), generator=generator)
            rule.update(observe(score, timesteps, torch.arange(40), group))


@pytest.mark.parametrize("what", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("make", RULES)
def test_a_score_that_says_nothing_changes_no_rule(make, what):
    """One such reference score used to make the moments NaN for ever, so that nobody was kept."""
    if make is rules.agc:
        pytest.skip("goes by the loss")
    rule, same = make(), make()
    warm(rule)
    warm(same)
    for group in (REFERENCE, TRAINED, SACRIFICED):
        rule.update(observe([what, what], timesteps=[50, 950], index=[1, 2], group=group))
    for name, value in same.state_dict().items():
        assert torch.equal(rule.state_dict()[name], value), name
    visits = observe([0.1, 1.0, 90.0], timesteps=950, index=[50, 51, 52])
    assert rule.decide(visits).keep_mask.any()


@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize("make", [rules.agc, rules.likelihood, rules.with_own_part])
def test_a_loss_that_is_not_finite_changes_no_rule(make, what):
    rule, same = make(), make()
    warm(rule)
    warm(same)
    for group in (REFERENCE, TRAINED, SACRIFICED):
        rule.update(observe([1.0, 1.0], timesteps=[50, 950], index=[1, 2], group=group, loss=what))
    for name, value in same.state_dict().items():
        assert torch.equal(rule.state_dict()[name], value), name


def test_running_statistics_pass_over_what_is_not_finite():
    values, bins = torch.tensor([1.0, math.nan, 2.0, math.inf, -math.inf]), torch.tensor([0, 0, 1, 1, 0])
    rest = torch.tensor([0, 2])
    for make in (lambda: BinnedMoments(2, 5), lambda: RunningQuantiles(2, -3, 3, 0.1, half_life=5)):
        some, all_ = make(), make()
        some.update(values[rest], bins[rest])
        all_.update(values, bins)
        for name, value in vars(some).items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, vars(all_)[name])
    some, all_ = Trend(2, 5), Trend(2, 5)
    some.update(values[rest], torch.tensor([0.1, 0.5]))
    all_.update(values, torch.tensor([0.1, 0.2, 0.5, 0.6, 0.7]))
    assert torch.equal(some.sums, all_.sums)


@pytest.mark.parametrize("half_life", [1, 50, 200])
def test_no_more_is_remembered_than_said(half_life):
    moments = BinnedMoments(1, half_life)
    for _ in range(20 * half_life):
        moments.update(torch.ones(1), torch.zeros(1, dtype=torch.long))
    assert moments.count.item() == pytest.approx(most_remembered(half_life), rel=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: Quantile(quantile=0.9, num_bins=10, **o),
        lambda **o: IetAgc(ratio=1.25, num_bins=10, **o),
        lambda **o: ZScoreEvidence(enter=1.0, leave=0.5, memory=0.8, min_timestep=0.7, num_bins=10, **o),
        rules.likelihood,
    ],
)
def test_a_warmup_that_is_never_reached_is_refused(make):
    says = r"exclusion\.warmup=100 is never reached.*exclusion\.half_life=50 .*72\.6.*half_life to at least 69 or lower"
    with pytest.raises(ValueError, match=says):
        make(half_life=50, warmup=100)
    make(half_life=69, warmup=100)
    make(half_life=50, warmup=72)


def test_the_shortest_half_life_that_the_remedy_names_does():
    for warmup in range(1, 400, 7):
        with pytest.raises(ValueError, match="half_life to at least") as refused:
            Quantile(quantile=0.3, num_bins=2, half_life=3, warmup=warmup + 10)
        least = int(str(refused.value).split("at least ")[1].split()[0])
        Quantile(quantile=0.3, num_bins=2, half_life=least, warmup=warmup + 10)


def test_other_half_lives_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match=r"exclusion\.warmup=5000 is never reached.*exclusion\.half_life=300"):
        rules.calibrated(num_bins=5, half_life=300, level_half_life=5000, warmup=5000)
    with pytest.raises(ValueError, match=r"exclusion\.shift_weight=20 is never reached.*exclusion\.canary_half_life=5"):
        rules.likelihood(canary_half_life=5, shift_weight=20)
