"""Statistics that judge a score: two groups, a threshold, an interval."""

import math

import pytest
import torch

from memtrain.core import scores
from memtrain.core.statistics import (
    auc,
    best_accuracy,
    bootstrap_interval,
    interval_over_groups,
    kernel_distance,
    threshold_at_fpr,
    tpr_at_fpr,
)


def normal(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) + shift


def test_strict_tpr_differs_from_the_nearest_one():
    """150 negatives, two tied at the top: FPR 0 or 2/150 = 1.3 %, which is nearer to 1 % and exceeds it."""
    negative = torch.cat([torch.arange(148.0), torch.tensor([500.0, 500.0])])
    positive = torch.tensor([400.0] * 5 + [500.0] * 3 + [600.0] * 2)
    thresholds = torch.cat([positive, negative]).unique()
    fprs = torch.stack([(negative >= threshold).double().mean() for threshold in thresholds])
    nearest = thresholds[(fprs - 0.01).abs().argmin()]
    assert (negative >= nearest).double().mean() > 0.01
    assert (positive >= nearest).double().mean() == 1.0
    assert tpr_at_fpr(positive, negative, 0.01) == pytest.approx(0.2)


@pytest.mark.parametrize("max_fpr", [0.0, 0.01, 0.05, 0.3])
def test_threshold_keeps_the_fpr_and_reaches_the_tpr(max_fpr):
    positive = normal(77, 0, 1.0).round(decimals=1)
    negative = normal(201, 1).round(decimals=1)
    threshold = threshold_at_fpr(negative, max_fpr)
    assert (negative >= threshold).double().mean() <= max_fpr
    assert (positive >= threshold).double().mean().item() == tpr_at_fpr(positive, negative, max_fpr)


def test_threshold_of_nothing_and_of_everything():
    assert math.isnan(threshold_at_fpr(torch.tensor([]), 0.01))
    assert threshold_at_fpr(torch.tensor([1.0]), 1.0) == -math.inf


def test_best_accuracy_equals_trying_all_thresholds():
    positive, negative = normal(31, 2, 0.7).round(decimals=1), normal(50, 3).round(decimals=1)
    candidates = torch.cat([positive, negative, torch.tensor([math.inf])])
    tried = [((positive >= c).sum() + (negative < c).sum()).item() / 81 for c in candidates]
    assert best_accuracy(positive, negative) == pytest.approx(max(tried))
    assert best_accuracy(torch.tensor([0.0]), torch.tensor([1.0, 1.0, 1.0])) == 0.75  # never below the larger group
    assert math.isnan(best_accuracy(positive, negative[:0]))


def test_bootstrap_interval_holds_the_value_and_narrows():
    small = bootstrap_interval(auc, normal(20, 4, 1.0), normal(20, 5), samples=120)
    large = bootstrap_interval(auc, normal(400, 4, 1.0), normal(400, 5), samples=120)
    truth = 0.5 * (1 + math.erf(1 / 2))  # P(N(1, 1) > N(0, 1))
    assert small[0] < truth < small[1] and large[0] < truth < large[1]
    assert large[1] - large[0] < (small[1] - small[0]) / 2
    assert small == bootstrap_interval(auc, normal(20, 4, 1.0), normal(20, 5), samples=120)  # same seed
    assert all(math.isnan(bound) for bound in bootstrap_interval(auc, normal(3, 0), normal(0, 0)))


def test_companion_scores_of_an_empty_prompt_are_zero():
    null = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    zero = scores.text_conditional_magnitude(null, null)
    assert scores.anisotropy(zero, null, null).eq(0).all()
    assert scores.bright_ending(null - null, torch.rand(3, 8, 8)).eq(0).all()
    assert scores.sharpness(null - null, null - null).eq(0).all()


def test_anisotropy_adds_the_cosine():
    null = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    cond = null + torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    found = scores.anisotropy(torch.ones(3), cond, null, gamma=(1.0, 2.0))
    torch.testing.assert_close(found, torch.tensor([3.0, 1.0, -1.0]))


def test_entropy_of_attention_is_that_of_the_mean():
    even = torch.full((1, 2, 5, 8), 1 / 8)
    torch.testing.assert_close(scores.cross_attention_entropy(even), torch.tensor([math.log(8)]))
    one = torch.eye(8)[[0] * 5].expand(1, 2, 5, 8)
    assert scores.cross_attention_entropy(one).item() == 0
    spread = torch.eye(8)[:5].expand(1, 2, 5, 8)  # each place its own token: five tokens share the attention
    torch.testing.assert_close(scores.cross_attention_entropy(spread), torch.tensor([math.log(5)]))


def test_bright_ending_is_the_magnitude_where_the_mask_is_even():
    difference = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = scores.text_conditional_magnitude(difference, torch.zeros_like(difference))
    for level in (0.01, 1.0):
        torch.testing.assert_close(scores.bright_ending(difference, torch.full((2, 8, 8), level)), plain)
    mask = torch.zeros(2, 8, 8)
    mask[:, :4] = 1
    bright = difference[:, :, :4].flatten(1).norm(dim=1) / 0.5
    torch.testing.assert_close(scores.bright_ending(difference, mask), bright)


def test_sharpness_is_the_product_with_the_curvature():
    """Scores of a Gaussian are linear, s(x) = -P x: the change along delta s is delta P s."""
    precision = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
    x = torch.tensor([[1.0, -2.0, 0.5]])
    score = -x @ precision
    moved = -(x + 0.1 * score) @ precision
    expected = 0.1 * (score @ precision).norm(dim=1)
    torch.testing.assert_close(scores.sharpness(score, moved), expected)


def test_an_interval_over_groups_draws_them_whole():
    """Twenty groups of fifty equal values: as wide as of twenty values, not of a thousand."""
    values = normal(20, 6)
    whole = interval_over_groups(values.repeat_interleave(50), torch.arange(20).repeat_interleave(50))
    assert whole == pytest.approx(interval_over_groups(values, torch.arange(100, 120)))
    assert whole[1] - whole[0] == pytest.approx(2 * 1.96 * values.std().item() / math.sqrt(20), rel=0.15)
    assert whole[0] < values.mean() < whole[1]
    uneven = interval_over_groups(torch.tensor([1.0, 1, 1, 0]), torch.tensor([0, 0, 0, 1]))
    assert uneven == (0, 1)
    assert all(math.isnan(bound) for bound in interval_over_groups(torch.ones(4), torch.zeros(4, dtype=torch.long)))
    assert all(math.isnan(bound) for bound in interval_over_groups(torch.ones(0), torch.zeros(0, dtype=torch.long)))


def test_the_kernel_distance_is_the_formula_pair_by_pair():
    one, other = normal(8 * 5, 7).reshape(8, 5), normal(6 * 5, 8, 0.5).reshape(6, 5)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return (float(x @ y) / 5 + 1) ** 3

    def within(side: torch.Tensor) -> float:
        pairs = [(i, j) for i in range(len(side)) for j in range(len(side)) if i != j]
        return sum(kernel(side[i], side[j]) for i, j in pairs) / len(pairs)

    between = sum(kernel(x, y) for x in one for y in other) / 48
    assert kernel_distance(one, other) == pytest.approx(within(one) + within(other) - 2 * between)
    assert math.isnan(kernel_distance(one, other[:1]))
    draws = [kernel_distance(normal(60, s).reshape(12, 5), normal(60, s + 500).reshape(12, 5)) for s in range(200)]
    assert abs(sum(draws) / 200) < 0.05  # unbiased: of one distribution it is 0 in the mean
