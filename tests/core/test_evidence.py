import math

import pytest
import torch

from memtrain.core.exclusion import CANARY, REFERENCE, SACRIFICED, TRAINED
from tests.support.observe import observe
from tests.support.rules import EVIDENCE, likelihood, with_own_part, z_scores


def warm(rule, seed: int = 0, group: int = REFERENCE, mean: float = 0.0, index: int = 99, count: int = 2000) -> None:
    """Scores whose logarithm is normal with deviation 1, in every bin."""
    log_score = torch.randn(count, generator=torch.Generator().manual_seed(seed)) + mean
    rule.update(observe(log_score.exp(), torch.arange(count) % 1000, torch.full((count,), index), group))


# ---- both


@pytest.mark.parametrize("make", EVIDENCE)
def test_nobody_is_left_out_before_the_reference_is_known(make):
    rule = make()
    assert rule.decide(observe([1e6])).keep_mask.all()
    rule.update(observe([1e6]))
    assert not rule.excluded.any()


@pytest.mark.parametrize("make", EVIDENCE)
def test_it_does_not_depend_on_the_order_within_a_step(make):
    rules = make(), make()
    for rule, direction in zip(rules, (1, -1), strict=True):
        warm(rule)
        rule.update(observe([1.0, 5.0, 9.0, 2.0][::direction], index=[1, 2, 1, 2][::direction]))
    torch.testing.assert_close(rules[0].evidence, rules[1].evidence)


@pytest.mark.parametrize("make", EVIDENCE)
def test_unscored_rows_enter_no_statistic(make):
    rule, same = make(), make()
    warm(rule)
    warm(same)
    for group in (TRAINED, REFERENCE, SACRIFICED):
        rule.update(observe([0.0, 0.0], index=[1, 2], scored=False, group=group))
    for name, value in same.state_dict().items():
        assert torch.equal(rule.state_dict()[name], value), name


@pytest.mark.parametrize("make", EVIDENCE)
def test_canaries_that_are_not_sacrificed_teach_nothing(make):
    rule = make()
    warm(rule)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    warm(rule, group=CANARY, mean=3.0, index=1)
    after = rule.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name in ("reference", "memorized"))


@pytest.mark.parametrize("make", EVIDENCE)
def test_resumed_equals_uninterrupted(make):
    whole, first, rest = make(), make(), make()
    steps = [(seed, group) for seed in range(4) for group in (REFERENCE, SACRIFICED, TRAINED)]
    for seed, group in steps:
        warm(whole, seed, group, mean=group / 3, index=group)
    for seed, group in steps[:5]:
        warm(first, seed, group, mean=group / 3, index=group)
    rest.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for seed, group in steps[5:]:
        warm(rest, seed, group, mean=group / 3, index=group)
    for name, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name


@pytest.mark.parametrize("make", EVIDENCE)
def test_the_checkpoint_of_another_corpus_or_rule_is_refused(make):
    with pytest.raises(ValueError, match="100 samples, this corpus has 50"):
        make(50).load_state_dict(make().state_dict())
    with pytest.raises(ValueError, match="resume with the exclusion"):
        make().load_state_dict(make(num_bins=5).state_dict())
    with pytest.raises(ValueError, match="no evidence"):
        make().load_state_dict({})


@pytest.mark.parametrize("make", EVIDENCE)
def test_a_sample_takes_at_most_8_bytes(make):
    sizes = [sum(v.numel() * v.element_size() for v in make(n).state_dict().values()) for n in (100, 1100)]
    assert (sizes[1] - sizes[0]) / 1000 <= 8


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (z_scores, "enter", -1),
        (z_scores, "leave", 2.0),
        (z_scores, "memory", 1.0),
        (z_scores, "min_timestep", 1.0),
        (z_scores, "num_bins", 0),
        (z_scores, "warmup", 0),
        (likelihood, "false_positive_rate", 0.0),
        (likelihood, "miss_rate", 1.0),
        (likelihood, "memory", math.nan),
        (likelihood, "clip", 0.0),
        (likelihood, "shift", -1.0),
        (likelihood, "shift_weight", 0.0),
        (likelihood, "canary_half_life", 0),
        (likelihood, "own_visits", 256),
        (likelihood, "own_limit", 0.0),
        (likelihood, "start_step", -1),
    ],
)
def test_the_option_that_is_wrong_is_named(make, option, value):
    with pytest.raises(ValueError, match=rf"exclusion\.{option}"):
        make(**{option: value})


def test_rates_that_a_coin_keeps_are_refused():
    with pytest.raises(ValueError, match=r"exclusion\.false_positive_rate \+ exclusion\.miss_rate must be < 1"):
        likelihood(false_positive_rate=0.6, miss_rate=0.5)


# ---- likelihood ratios


def visits(rule, index: torch.Tensor, mean: float, generator: torch.Generator, group=TRAINED) -> None:
    score = (torch.randn(len(index), generator=generator) + mean).exp()
    rule.update(observe(score, torch.randint(0, 1000, (len(index),), generator=generator), index, group))


@pytest.mark.parametrize("shift", [1.0, 0.5, -0.8])
def test_the_error_rates_of_the_test_are_those_asked_for(shift):
    """Wald: a test that ends at the first bound that is crossed errs with at most fpr / (1 - miss) and
    miss / (1 - fpr). The shift is learnt from sacrificed canaries, whichever its sign."""
    fpr, miss, n = 0.05, 0.1, 3000
    rates = {}
    for memorized in (False, True):
        rule = likelihood(
            2 * n,
            false_positive_rate=fpr,
            miss_rate=miss,
            memory=1.0,
            clip=100.0,
            half_life=10**9,
            canary_half_life=10**9,
        )
        warm(rule, 1, REFERENCE, index=2 * n - 1, count=50_000)
        warm(rule, 2, SACRIFICED, mean=shift, index=2 * n - 2, count=50_000)
        generator, open_tests = torch.Generator().manual_seed(3), torch.arange(n)
        entered = 0
        for _ in range(1000):
            visits(rule, open_tests, shift if memorized else 0.0, generator)
            entered += rule.excluded[open_tests].sum().item()
            ended = rule.excluded[open_tests] | (rule.evidence[open_tests] <= rule.leave)
            open_tests = open_tests[~ended]
            if len(open_tests) == 0:
                break
        assert len(open_tests) == 0
        rates[memorized] = entered / n
    noise = 3 * math.sqrt(0.1 * 0.9 / n)
    assert rates[False] < fpr / (1 - miss) + noise
    assert 1 - rates[True] < miss / (1 - fpr) + noise


def test_it_is_quick_to_enter_and_slow_to_leave_and_holds_at_every_timestep():
    rule = likelihood()
    warm(rule, 1, REFERENCE)
    warm(rule, 2, SACRIFICED, mean=2.0, index=98)
    visits_in, visits_out = 0, 0
    while not rule.excluded[5]:
        rule.update(observe([math.exp(2.0)], index=[5]))
        visits_in += 1
    assert visits_in == 2  # 2 (2 - 2 / 2) = 2 a visit, against log(0.9 / 0.05) = 2.9
    for _ in range(20):
        rule.update(observe([math.exp(2.0)], index=[5]))
    unscored = observe([0.0], 10, index=[5], scored=False)
    assert not rule.decide(unscored).keep_mask.item()
    while rule.excluded[5]:
        rule.update(observe([math.exp(0.0)], index=[5]))
        visits_out += 1
    assert visits_out > 3 * visits_in and rule.decide(unscored).keep_mask.item()


def test_ordinary_samples_stay_and_do_not_take_longer_to_enter_later():
    rule = likelihood()
    warm(rule, 1, REFERENCE)
    warm(rule, 2, SACRIFICED, mean=2.0, index=98)
    generator, excluded = torch.Generator().manual_seed(4), 0.0
    for _ in range(100):
        visits(rule, torch.arange(90), 0.0, generator)
        excluded += rule.excluded[:90].float().mean().item() / 100
    assert excluded < 0.05
    assert rule.evidence.min() >= rule.leave  # it rests there, after a hundred visits as after ten


def test_one_outlier_does_not_decide():
    rule = likelihood(clip=2.0)
    warm(rule, 1, REFERENCE)
    warm(rule, 2, SACRIFICED, mean=2.0, index=98)
    assert rule.decide(observe([1e9], index=[5])).keep_mask.item()
    rule.update(observe([1e9], index=[5]))
    assert not rule.excluded[5] and rule.evidence[5].item() == pytest.approx(2.0)


def test_without_canaries_it_sums_z_scores():
    rule = likelihood(shift=1.0, memory=1.0)
    warm(rule, 1, REFERENCE)
    mean, deviation = rule.reference.mean[9].item(), rule.reference.std[9].item()
    rule.update(observe([math.exp(mean + 1.5 * deviation)] * 2, index=[5, 5]))
    assert rule.evidence[5].item() == pytest.approx(2 * (1.5 - 0.5), abs=1e-4)


def test_canaries_that_are_not_memorized_yet_say_nothing():
    """While sacrificed canaries score what the reference set scores, no visit moves the evidence much."""
    rule = likelihood()
    warm(rule, 1, REFERENCE, count=10_000)
    warm(rule, 2, SACRIFICED, mean=0.0, index=98, count=10_000)
    shown, counts = rule.shows(observe([math.exp(-2.0), 1.0, math.exp(2.0)]))
    assert counts.all() and shown.abs().max() < 0.4


def test_a_low_loss_at_an_ordinary_score_is_evidence():
    rule = likelihood()
    warm(rule, 1, REFERENCE)
    shown, _ = rule.shows(observe([1.0, 1.0], loss=[0.05, 1.0]))
    assert shown[0] > 0 > shown[1]


def many_visits(rule, means: list[float], seed: int) -> None:
    """One visit of 90 samples at each of these means, in standard deviations of the reference set."""
    generator = torch.Generator().manual_seed(seed)
    for mean in means:
        visits(rule, torch.arange(90), mean, generator)


def test_a_picture_that_always_stands_out_a_little_stays_and_one_that_comes_to_enters():
    always, grown = [1.0] * 60, [1.0] * 20 + [2.5] * 40
    entered = {}
    for name, means in (("always", always), ("grown", grown)):
        for make in (likelihood, with_own_part):
            rule = make()
            warm(rule, 1, REFERENCE)
            warm(rule, 2, SACRIFICED, mean=1.5, index=98)
            many_visits(rule, means, 5)
            entered[name, make] = rule.excluded[:90].float().mean().item()
    assert entered["always", likelihood] > 0.5 and entered["always", with_own_part] < 0.2
    assert entered["grown", with_own_part] > 0.95


def test_a_sample_that_is_known_by_heart_from_the_start_enters_all_the_same():
    rule = with_own_part()
    warm(rule, 1, REFERENCE)
    warm(rule, 2, SACRIFICED, mean=2.0, index=98)
    many_visits(rule, [3.0] * 20, 6)
    assert rule.excluded[:90].all()


def test_the_own_part_is_the_shrunk_mean_of_the_first_visits():
    rule = with_own_part(own_visits=3, own_limit=10.0)
    warm(rule, 1, REFERENCE)
    z = [rule.z_scores(observe([math.exp(x)])).item() for x in (2.0, -1.0, 5.0)]
    rule.update(observe([math.exp(2.0), math.exp(-1.0)], index=[5, 5]))  # two visits in one step
    assert rule.own_part(torch.tensor([5])).item() == pytest.approx((z[0] + z[1]) / (2 + 4), abs=1e-2)
    for _ in range(2):  # the second is no first visit any more
        rule.update(observe([math.exp(5.0)], index=[5]))
    assert rule.own_part(torch.tensor([5])).item() == pytest.approx(sum(z) / (3 + 4), abs=1e-2)
    rule.own_limit = 0.5
    assert rule.own_part(torch.tensor([5, 6])).tolist() == [0.5, 0.0]


# ---- z-scores


def test_z_scores_enter_above_stay_at_every_timestep_and_leave_below():
    rule = z_scores()
    warm(rule)
    high, ordinary = math.exp(3.0), math.exp(0.0)
    steps = 0
    while not rule.excluded[5]:
        rule.update(observe([high], index=[5]))
        steps += 1
    assert steps == 2  # 1 - 0.8^k of z = 3 reaches 1 on the second visit
    at_low_noise = observe([ordinary], timesteps=100, index=[5])
    assert not rule.decide(at_low_noise).keep_mask.item()  # out at every timestep; this visit changes nothing
    rule.update(at_low_noise)
    assert rule.excluded[5]
    visits = 0
    while rule.excluded[5]:
        rule.update(observe([ordinary], index=[5]))
        visits += 1
    # slow to leave: below `leave`, not `enter`
    assert visits == math.ceil(math.log(0.5 / 1.08) / math.log(0.8))
    assert rule.decide(at_low_noise).keep_mask.item()


def test_z_scores_of_ordinary_samples_stay_rare():
    """Standard normal z-scores: the moving average has deviation sqrt((1-m)/(1+m)) = 1/3, so 1 is 3 sigma."""
    rule = z_scores()
    warm(rule)
    generator = torch.Generator().manual_seed(1)
    excluded = 0.0
    for _ in range(200):
        rule.update(observe(torch.randn(99, generator=generator).exp()))
        excluded += rule.excluded[:99].float().mean().item() / 200
    assert excluded < 0.02


# ---- how many samples of the corpus show a picture


def test_the_more_samples_show_a_picture_the_less_else_has_to_speak_for_it():
    visits = {}
    for copies in (1, 2, 20, 300, 100_000):
        rule = likelihood(false_positive_rate=0.01, clip=1.0)
        warm(rule)
        visits[copies] = 1
        while rule.decide(observe([math.e**1.2], index=[3], copies=copies)).keep_mask.all():
            rule.update(observe([math.e**1.2], index=[3], copies=copies))
            visits[copies] += 1
    assert visits[1] > visits[20] > visits[300] >= visits[100_000] >= 1 and visits[1] >= visits[2]


def test_no_number_of_copies_leaves_a_picture_out_without_evidence():
    rule = likelihood(false_positive_rate=0.01, clip=1.0)
    warm(rule)
    assert rule.decide(observe([1e-3], index=[3], copies=10**9)).keep_mask.all()
    unscored = observe([1e6], index=[3], copies=10**9, scored=False)
    assert rule.decide(unscored).keep_mask.all()


def test_a_picture_with_copies_comes_back_and_rests_as_far_below_the_bound_as_others():
    rule = likelihood(false_positive_rate=0.01, clip=1.0)
    warm(rule)
    for copies, index in ((1, 3), (300, 4)):
        while not rule.excluded[index]:
            rule.update(observe([math.e**2], index=[index], copies=copies))
        while rule.excluded[index]:
            rule.update(observe([math.e**-2], index=[index], copies=copies))
        for _ in range(100):
            rule.update(observe([math.e**-2], index=[index], copies=copies))
        resting = rule.evidence[index] + rule.prior(torch.tensor([copies]))
        torch.testing.assert_close(resting, torch.tensor([rule.leave], dtype=torch.float32))


def test_a_weight_of_zero_makes_nothing_of_copies_and_less_is_refused():
    assert likelihood(copies_weight=0.0).prior(torch.tensor([1, 300])).tolist() == [0, 0]
    assert likelihood().prior(torch.tensor([1])).tolist() == [0]
    with pytest.raises(ValueError, match=r"exclusion\.copies_weight must be >= 0, got -1"):
        likelihood(copies_weight=-1.0)


def test_what_is_latched_stays_out_and_is_pulled_while_its_visits_say_memorized():
    """A rule without the latch says of the same visits whom its evidence is against."""
    held, free = likelihood(latch=True), likelihood()
    for rule in (held, free):
        warm(rule)
    seen = []
    for visits, score in ((10, 20.0), (60, 0.05), (10, 20.0)):
        for _ in range(visits):
            observed = observe([score, 1.0], index=[1, 2])
            here, there = held.decide(observed), free.decide(observed)
            assert torch.equal(here.pull_mask, ~there.keep_mask) and torch.equal(there.pull_mask, ~there.keep_mask)
            seen.append((here.keep_mask[0].item(), there.keep_mask[0].item()))
            assert here.keep_mask[1]
            held.update(observed)
            free.update(observed)
    first = seen.index((False, False))
    assert not any(kept for kept, _ in seen[first:])  # once out it stays out
    assert any(kept for _, kept in seen[first:])  # where the other lets it in again
    again = likelihood(latch=True)
    again.load_state_dict(held.state_dict())
    assert not again.decide(observe([1e-6], index=[1])).keep_mask.any()
