import math

import pytest
import torch

from memtrain.core.diffusion import DDPM, DENSITIES, RectifiedFlow, draw
from memtrain.core.scores import text_conditional_magnitude
from memtrain.core.streams import Stream

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
EPSILON, VELOCITY, FLOW = DDPM(ALPHAS, "epsilon"), DDPM(ALPHAS, "v_prediction"), RectifiedFlow()
PROCESSES = pytest.mark.parametrize("process", [EPSILON, VELOCITY, FLOW], ids=["epsilon", "v", "flow"])
T = torch.tensor([1, 50, 300, 600, 900, 998])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@PROCESSES
def test_the_target_is_read_back_as_the_noise(process):
    latents, noise = normal(6, 4, 8, 8), normal(6, 4, 8, 8, seed=1)
    noisy = process.add_noise(latents, noise, T)
    found = process.to_noise(process.target(latents, noise, T), noisy, T)
    torch.testing.assert_close(found, noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("process", "factor"),
    [(EPSILON, torch.ones(6)), (VELOCITY, ALPHAS[T].sqrt()), (FLOW, 1 - (T + 1) / 1000)],
    ids=["epsilon", "v", "flow"],
)
def test_scores_differ_from_those_of_the_networks_outputs_by_a_closed_form(process, factor):
    """Two predictions at one x_t: their noises are sqrt(abar), or 1 - sigma, times as far apart."""
    noisy, cond, null = normal(6, 4, 8, 8), normal(6, 4, 8, 8, seed=1), normal(6, 4, 8, 8, seed=2)
    score = text_conditional_magnitude(*(process.to_noise(p, noisy, T) for p in (cond, null)))
    torch.testing.assert_close(score, factor * text_conditional_magnitude(cond, null), atol=1e-4, rtol=1e-4)


def test_processes_that_told_the_same_noise_give_the_same_score():
    """One picture and two noises at the same x_t, told as v: the score is the distance of the noises."""
    x_t, noises = normal(6, 4, 8, 8), (normal(6, 4, 8, 8, seed=1), normal(6, 4, 8, 8, seed=2))
    expected = text_conditional_magnitude(*noises)
    for process in (VELOCITY, FLOW):
        told = []
        for noise in noises:
            level = process.noise_level(T).reshape(-1, 1, 1, 1)
            signal = 1 - level if process is FLOW else (1 - level.square()).sqrt()
            told.append(process.target((x_t - level * noise) / signal, noise, T))
        found = text_conditional_magnitude(*(process.to_noise(v, x_t, T) for v in told))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_rectified_flow_ends_at_noise_and_its_prediction_is_also_a_picture():
    latents, noise = normal(6, 4, 8, 8), normal(6, 4, 8, 8, seed=1)
    assert torch.equal(FLOW.add_noise(latents, noise, torch.full((6,), 999)), noise)
    noisy, v = FLOW.add_noise(latents, noise, T), FLOW.target(latents, noise, T)
    torch.testing.assert_close(FLOW.to_clean(v, noisy, T), latents, atol=1e-5, rtol=1e-5)


@PROCESSES
def test_min_snr_weights_bound_the_loss_on_x0(process):
    t, level = torch.arange(0, 1000, 37), process.noise_level(torch.arange(0, 1000, 37))
    snr = ((1 - level) if process is FLOW else (1 - level.square()).sqrt()).square() / level.square()
    # |target error|^2 = to_x0 |x0 error|^2
    to_x0 = {EPSILON: snr, VELOCITY: snr + 1, FLOW: level**-2}[process]
    torch.testing.assert_close(process.min_snr_weights(t, 5.0) * to_x0, snr.clamp(max=5.0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("prediction_type", "last"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weights_at_a_terminal_snr_of_zero_are_their_limits(prediction_type, last):
    """Where abar_T = 0 there is no signal: min(SNR, gamma) / SNR was 0 / 0."""
    weight = DDPM(torch.tensor([0.9, 1e-6, 0.0]), prediction_type).min_snr_weights(torch.arange(3), 5.0)
    assert weight.isfinite().all() and weight[2] == last
    torch.testing.assert_close(weight[1], weight[2], atol=1e-5, rtol=0)


def test_draws_of_a_row_do_not_depend_on_its_batch():
    together = draw(1, Stream.TRAIN, 5, range(8), (4, 4, 4), EPSILON)
    for place in (0, 3, 7):
        alone = draw(1, Stream.TRAIN, 5, [place], (4, 4, 4), EPSILON)
        for name in alone.__dataclass_fields__:
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[place]), name
    other = draw(1, Stream.REFERENCE_ROW, 5, range(8), (4, 4, 4), EPSILON)
    assert not torch.equal(other.noise, together.noise)


def test_draws_look_random_over_steps_and_places():
    draws = [draw(0, Stream.TRAIN, step, range(64), (1, 2, 2), EPSILON) for step in range(32)]
    timesteps = torch.cat([d.timesteps for d in draws]).double()
    noise = torch.cat([d.noise for d in draws]).flatten(1)
    assert abs(timesteps.mean() - 499.5) < 4 * 288.7 / math.sqrt(len(timesteps))
    assert (torch.corrcoef(noise.T) - torch.eye(4)).abs().max() < 0.1


def sigmas(count=4000, **options):
    process, generator = RectifiedFlow(**options), torch.Generator().manual_seed(0)
    return process.noise_level(torch.stack([process.draw_timestep(generator) for _ in range(count)]))


def test_sigma_is_drawn_as_the_density_says():
    """Against the quantiles that follow from the formulas: of a uniform u, those of the mapped u."""
    ranks = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    error = 0.03  # some deviations of a quantile of 4,000 draws
    logit_normal = torch.sigmoid(0.5 + 0.8 * torch.distributions.Normal(0, 1).icdf(ranks))
    found = sigmas(density="logit_normal", logit_mean=0.5, logit_std=0.8).quantile(ranks)
    assert (found - logit_normal).abs().max() < error
    assert (sigmas(density="uniform").quantile(ranks) - ranks).abs().max() < error
    # of 1 - f(u), which falls with u
    mode = 1 - (1 - ranks) - 1.29 * (torch.cos(math.pi / 2 * (1 - ranks)).square() - ranks)
    assert (sigmas(density="mode", mode_scale=1.29).quantile(ranks) - mode).abs().max() < error


def test_a_shift_moves_sigma_towards_noise():
    plain, shifted = sigmas(density="uniform"), sigmas(density="uniform", shift=3.0)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), atol=4e-3, rtol=0)


@pytest.mark.parametrize("density", DENSITIES)
def test_timesteps_are_within_the_process(density):
    process, generator = RectifiedFlow(density=density, logit_std=9.0, shift=6.0), torch.Generator().manual_seed(1)
    drawn = torch.stack([process.draw_timestep(generator) for _ in range(500)])
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() <= 999


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"density": "cosine"}, "density must be one of uniform, logit_normal, mode, got cosine"),
        ({"mode_scale": 2.0}, r"mode_scale must be in \[-1, 1.75\], got 2"),
        ({"shift": 0.0}, "shift must be > 0, got 0"),
        ({"logit_std": -1.0}, "logit_std must be > 0, got -1"),
    ],
)
def test_what_makes_no_density_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        RectifiedFlow(**options)


def test_another_prediction_type_is_refused():
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, v_prediction, got sample"):
        DDPM(ALPHAS, "sample")
