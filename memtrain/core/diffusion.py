"""Timesteps, noising, targets, and the conversion of any parameterisation to noise.

Shapes: B samples, C latent channels, H x W latent size. `alphas_cumprod` is the schedule, (T,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.core.streams import Stream, place_seed

PREDICTION_TYPES = ("epsilon", "v_prediction")


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values of B samples, shaped to multiply `like`, in its dtype. (B,) -> (B, 1, ..., 1)"""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type}")


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Noisy latents x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4). (B, C, H, W)"""
    alpha_bar = alphas_cumprod[timesteps]
    return _per_sample(alpha_bar.sqrt(), latents) * latents + _per_sample((1 - alpha_bar).sqrt(), latents) * noise


def prediction_target(
    latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """What the network is asked to predict: eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
    (Salimans & Ho 2022, appendix D). (B, C, H, W)"""
    _check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return noise
    alpha_bar = alphas_cumprod[timesteps]
    return _per_sample(alpha_bar.sqrt(), latents) * noise - _per_sample((1 - alpha_bar).sqrt(), latents) * latents


def to_noise(
    prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """The noise that a prediction stands for: eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t. (B, C, H, W)

    Scores are taken between noises, so that thresholds carry over between parameterisations:
    the difference of two converted predictions at one x_t is sqrt(abar_t) (v_1 - v_2).
    """
    _check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return prediction
    alpha_bar = alphas_cumprod[timesteps]
    return (
        _per_sample(alpha_bar.sqrt(), prediction) * prediction
        + _per_sample((1 - alpha_bar).sqrt(), prediction) * noisy_latents
    )


def signal_to_noise(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The signal-to-noise ratio SNR(t) = abar_t / (1 - abar_t). (B,) -> (B,)"""
    alpha_bar = alphas_cumprod[timesteps]
    return alpha_bar / (1 - alpha_bar)


@dataclass(frozen=True)
class Draws:
    """All that is random about B samples in one step."""

    timesteps: Tensor  # (B,) int64 in [0, T)
    noise: Tensor  # (B, C, H, W)
    posterior_noise: Tensor  # (B, C, H, W), for sampling the VAE's posterior
    offset_noise: Tensor  # (B, C, 1, 1)
    uniform: Tensor  # (B,) in [0, 1): a caption is dropped where it is below the dropout rate

    def to(self, device: torch.device) -> Draws:
        return Draws(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def draw(
    seed: int, stream: Stream, step: int, places: Sequence[int], latent_shape: Sequence[int], num_timesteps: int
) -> Draws:
    """Draw timesteps and noises for the rows at `places` of the global batch of `step`, on the CPU.

    Every row has a generator of its own, so a row's draws are the same whichever rank holds it.
    """
    channels = latent_shape[0]
    rows = []
    for place in places:
        generator = torch.Generator().manual_seed(place_seed(seed, stream, step, place))
        rows.append(
            (
                torch.randint(num_timesteps, (), generator=generator),
                torch.randn(*latent_shape, generator=generator),
                torch.randn(*latent_shape, generator=generator),
                torch.randn(channels, 1, 1, generator=generator),
                torch.rand((), generator=generator),
            )
        )
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))
