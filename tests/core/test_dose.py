"""Copy rate against repeats, and the dose at which half are copied."""

import math

import pytest
import torch

from memtrain.core.dose import dose_curve, half_dose, isotonic


def test_the_isotonic_regression_is_that_of_pooled_neighbours():
    """Against pooling adjacent violators one by one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        weights = torch.randint(1, 5, (9,), generator=generator).double()
        means = torch.rand(9, generator=generator).double()
        pooled = [[mean, weight, 1] for mean, weight in zip(means.tolist(), weights.tolist(), strict=True)]
        while (place := next((i for i in range(len(pooled) - 1) if pooled[i][0] > pooled[i + 1][0]), None)) is not None:
            (m, w, n), (k, v, o) = pooled[place], pooled.pop(place + 1)
            pooled[place] = [(m * w + k * v) / (w + v), w + v, n + o]
        slow = [mean for mean, _, length in pooled for _ in range(length)]
        assert isotonic(means * weights, weights).tolist() == pytest.approx(slow)


def test_half_are_copied_between_doses_on_the_logarithm_or_beyond_them():
    doses, ten = torch.tensor([1, 10, 100]), torch.full((3,), 10)
    assert half_dose(doses, torch.tensor([0, 0, 10]), ten) == pytest.approx(math.sqrt(1000))
    assert half_dose(doses, torch.tensor([0, 5, 10]), ten) == pytest.approx(10)
    assert half_dose(doses, torch.tensor([0, 1, 4]), ten) == math.inf
    assert half_dose(doses, torch.tensor([6, 7, 9]), ten) == -math.inf
    # a smaller dose that is copied more by chance: both count as their mean, 0.25
    assert half_dose(doses, torch.tensor([5, 0, 10]), ten) == pytest.approx(10 ** (1 + 1 / 3))


def test_a_curve_has_intervals_over_canaries_not_over_generations():
    """Three canaries a dose, four generations each that are copies together or not at all."""
    repeats = torch.tensor([1, 20, 400]).repeat_interleave(12)
    canary = torch.arange(9).repeat_interleave(4)
    copied = torch.tensor([False] * 3 + [True, False, False] + [True] * 3).repeat_interleave(4)
    curve = dose_curve(repeats, canary, copied)
    assert curve.repeats == [1, 20, 400] and curve.canaries == [3, 3, 3]
    assert curve.rates == pytest.approx([0, 1 / 3, 1])
    assert (curve.low[1], curve.high[1]) == (0, 1)  # of three canaries little is known, however many generations
    assert curve.half == pytest.approx(math.exp(math.log(20) + math.log(20) / 4))
    assert curve.half_low < curve.half < curve.half_high and curve.half_low > 1
    never = dose_curve(repeats, canary, torch.zeros(36, dtype=torch.bool))
    assert never.half == math.inf and never.said(never.half) == "above 400" and never.half_low == math.inf
    assert curve.said(-math.inf) == "below 1" and math.isnan(dose_curve(repeats[:4], canary[:4], copied[:4]).low[0])
    with pytest.raises(ValueError, match="at least one canary"):
        dose_curve(repeats[:0], canary[:0], copied[:0])
