"""The evidence of visits against the same figures from all visits, and against chance."""

import numpy as np
import pytest
import torch

from memtrain.core.visits import columns_of, evidence, level, log_ratio, rise, sums_of


def summed(z: np.ndarray, time: np.ndarray, picture: np.ndarray) -> torch.Tensor:
    columns = columns_of(torch.from_numpy(z), torch.from_numpy(time))
    return sums_of(columns, torch.from_numpy(picture), int(picture.max()) + 1)


@pytest.mark.parametrize("told", [level, rise])
def test_strength_is_in_standard_deviations_of_chance_whatever_the_visits(told):
    draw = np.random.default_rng(0)
    often = draw.integers(1, 30, 4000)
    picture, null = np.repeat(np.arange(4000), often), np.arange(4000) < 2000
    time = draw.random(len(picture))
    own = draw.normal(size=4000)[picture] * (1 if told is rise else time)
    z = 1.3 * draw.normal(size=len(picture)) + 0.7 * own
    found = told(summed(z, time, picture), torch.from_numpy(null)).numpy()
    for some in (~null & (often == 2), ~null & (often > 2) & (often < 10), ~null & (often >= 10)):
        assert found[some].std() == pytest.approx(1, abs=0.15)
    follows = np.where(null[picture], z, z + 3 * time)  # what it is there to find
    found = told(summed(follows, time, picture), torch.from_numpy(null)).numpy()
    assert (found[~null & (often > 10)] > 2).mean() > (0.9 if told is level else 0.5)
    nobody = torch.zeros(4000, dtype=torch.bool)
    assert not told(summed(z, time, picture), nobody).any()  # nobody to compare with


def test_a_score_that_began_next_to_nothing_has_not_risen_beyond_measure():
    """An anchored score's logarithm has no floor: a first visit at -12 deviations is one at -3."""
    draw, visits = np.random.default_rng(0), 8
    z = draw.normal(size=(300, visits))
    z[:2, 0] = -12.0, -3.0
    z[1, 1:] = z[0, 1:]
    time = np.tile(np.arange(1, visits + 1) / visits, 300)
    null = torch.arange(300) >= 100
    found = evidence(summed(z.ravel(), time, np.repeat(np.arange(300), visits)), null)
    assert found[0] == found[1] < 4


def test_of_single_visits_only_the_level_is_told():
    z = np.random.default_rng(0).normal(size=200)
    sums, everybody = summed(z, np.ones(200), np.arange(200)), torch.ones(200, dtype=torch.bool)
    np.testing.assert_allclose(level(sums, everybody).numpy(), z / np.sqrt((z**2).mean()))
    assert not rise(sums, everybody).any()
    assert torch.equal(evidence(sums, everybody), level(sums, everybody).clamp(min=0))


def test_the_coefficient_is_that_of_least_squares():
    """Two pictures to compare with, so that a, b and the coefficients can be had from numpy alone."""
    draw = np.random.default_rng(1)
    picture, time = np.repeat([0, 1, 2], [7, 9, 5]), draw.random(21)
    z = draw.normal(size=21) + 2 * time * (picture == 2)
    slopes, variances = [], []
    for number in range(3):
        mine = picture == number
        (slope, _), residual, *_ = np.polyfit(time[mine], z[mine], 1, full=True)
        slopes.append(slope)
        variances.append((residual[0], ((time[mine] - time[mine].mean()) ** 2).sum()))
    within = (variances[0][0] + variances[1][0]) / (7 + 9 - 4)
    squares = np.array([square for _, square in variances])
    between = max(sum(slopes[n] ** 2 * squares[n] - within for n in (0, 1)) / squares[:2].sum(), 0)
    expected = np.array(slopes) / np.sqrt(between + within / squares)
    found = rise(summed(z, time, picture), torch.tensor([True, True, False]))
    np.testing.assert_allclose(found.numpy(), expected)


def test_sums_of_parts_are_the_sums_of_the_whole():
    draw = np.random.default_rng(2)
    z, time, picture = draw.normal(size=300), draw.random(300), np.append(draw.integers(0, 20, 299), 19)
    picture[100] = 19
    parts = [summed(z[part], time[part], picture[part]) for part in (slice(0, 101), slice(101, 300))]
    torch.testing.assert_close(parts[0] + parts[1], summed(z, time, picture))


def test_a_score_or_loss_of_nothing_is_finite():
    assert log_ratio(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 0.0])).isfinite().all()
    assert log_ratio(torch.tensor([2.0]), torch.tensor([4.0])).item() == 0
