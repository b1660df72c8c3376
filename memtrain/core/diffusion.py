"""Noise processes: how latents become noise, timestep by timestep, and what a prediction says of noise and picture.

Shapes: B samples, C latent channels, H x W latent size. A timestep is a number in [0, T) that grows with the noise;
where a sample is noised to is x_t = a_t x_0 + s_t eps, eps standard normal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memtrain.core.streams import Stream, place_seed
from memtrain.core.transfer import sent

PREDICTION_TYPES = ("epsilon", "v_prediction")
DENSITIES = ("uniform", "logit_normal", "mode")
_ALL_NOISE = 1 - 1e-6  # a noise level in float32 that leaves no signal


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values of B samples, shaped to multiply `like`, in its dtype. (B,) -> (B, 1, ..., 1)"""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


class NoiseProcess(nn.Module, ABC):
    """The way from latents to noise, and what a network that was trained on it predicts.

    Latents, noise and predictions are (B, C, H, W), timesteps (B,). A module, so that its schedule is where the
    model is; nothing of it is trained or saved.
    """

    num_timesteps: int  # T

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the schedule lies, and so where the model computes."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents x_t."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is asked to predict."""

    @abstractmethod
    def to_noise(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction stands for: scores are taken between noises, so that thresholds carry over."""

    @abstractmethod
    def noise_level(self, timesteps: Tensor) -> Tensor:
        """s_t, how much of x_t is noise. Any shape, and that shape again"""

    def is_all_noise(self, timesteps: Tensor) -> Tensor:
        """Whether x_t holds no signal, so that its noise is known without a network. Any shape, and that again, bool"""
        return self.noise_level(timesteps) >= _ALL_NOISE

    def comparable(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """What scores of a finished model compare: the noise that a prediction stands for.

        Where x_t is all noise that is x_t whatever is predicted: there it is the prediction itself.
        """
        all_noise = self.is_all_noise(timesteps).reshape(-1, *[1] * (prediction.ndim - 1))
        return torch.where(all_noise, prediction, self.to_noise(prediction, noisy_latents, timesteps))

    @abstractmethod
    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights of the losses so that the loss on x_0 is weighed by min(SNR, gamma) (Hang et al., ICCV 2023).

        (B,) -> (B,). Where there is no signal left they are their limits.
        """

    @abstractmethod
    def draw_timestep(self, generator: torch.Generator, latent_shape: Sequence[int] = ()) -> Tensor:
        """A timestep to train on, for a picture whose latents are (C, H, W). () int64"""


class DDPM(NoiseProcess):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4); the network predicts eps or v.

    Args:
        alphas_cumprod: the schedule abar, (T,) float32.
        prediction_type: one of PREDICTION_TYPES.
    """

    alphas_cumprod: Tensor

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str):
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type}")
        self.prediction_type, self.num_timesteps = prediction_type, len(alphas_cumprod)
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha_bar = self.alphas_cumprod[timesteps]
        return _per_sample(alpha_bar.sqrt(), latents) * latents + _per_sample((1 - alpha_bar).sqrt(), latents) * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        alpha_bar = self.alphas_cumprod[timesteps]
        return _per_sample(alpha_bar.sqrt(), latents) * noise - _per_sample((1 - alpha_bar).sqrt(), latents) * latents

    def to_noise(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t, so that two v at one x_t differ by sqrt(abar_t) of it."""
        if self.prediction_type == "epsilon":
            return prediction
        alpha_bar = self.alphas_cumprod[timesteps]
        return (
            _per_sample(alpha_bar.sqrt(), prediction) * prediction
            + _per_sample((1 - alpha_bar).sqrt(), prediction) * noisy_latents
        )

    def noise_level(self, timesteps: Tensor) -> Tensor:
        return (1 - self.alphas_cumprod[timesteps]).sqrt()

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v, with SNR = abar_t / (1 - abar_t)."""
        alpha_bar = self.alphas_cumprod[timesteps]
        snr = alpha_bar / (1 - alpha_bar)
        if self.prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        return (gamma / snr).clamp(max=1)

    def draw_timestep(self, generator: torch.Generator, latent_shape: Sequence[int] = ()) -> Tensor:
        return torch.randint(self.num_timesteps, (), generator=generator)


class RectifiedFlow(NoiseProcess):
    """x_t = (1 - sigma) x_0 + sigma eps, sigma = (t + 1) / T; the network predicts v = eps - x_0 (Liu et al. 2023).

    Timesteps are even in sigma, whatever sigma is drawn like, so that bins of timesteps are bins of sigma.

    Args:
        num_timesteps: T; a network of diffusers is told T sigma.
        density: of the sigma that is trained on (Esser et al. 2024, section 3.1): `uniform`; `logit_normal`, the
            sigmoid of a normal draw; `mode`, heavier in the middle or, with a negative scale, at both ends.
        logit_mean, logit_std: of the normal draw.
        mode_scale: of `mode`, in [-1, 2 / (pi - 2)].
        shift: sigma <- shift sigma / (1 + (shift - 1) sigma): more noise for larger pictures (there, section 5.3.2).
            A number, or what gives it for the (C, H, W) of a picture's latents.

    Raises:
        ValueError: a density that there is not, a scale or shift out of range.
    """

    _at: Tensor

    def __init__(
        self,
        num_timesteps: int = 1000,
        density: str = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        shift: float | Callable[[Sequence[int]], float] = 1.0,
    ):
        super().__init__()
        if density not in DENSITIES:
            raise ValueError(f"model.density must be one of {', '.join(DENSITIES)}, got {density}")
        if not -1 <= mode_scale <= 2 / (math.pi - 2):
            raise ValueError(f"model.mode_scale must be in [-1, {2 / (math.pi - 2):.2f}], got {mode_scale:g}")
        for name, value in (("logit_std", logit_std), ("shift", shift)):
            if not callable(value) and not value > 0:
                raise ValueError(f"model.{name} must be > 0, got {value:g}")
        self.num_timesteps, self.density = num_timesteps, density
        self.logit_mean, self.logit_std, self.mode_scale, self.shift = logit_mean, logit_std, mode_scale, shift
        self.register_buffer("_at", torch.empty(0), persistent=False)  # goes where the model goes

    @property
    def device(self) -> torch.device:
        return self._at.device

    def noise_level(self, timesteps: Tensor) -> Tensor:
        """sigma."""
        return (timesteps.float() + 1) / self.num_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = _per_sample(self.noise_level(timesteps), latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def to_noise(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """eps = x_t + (1 - sigma) v, so that two v at one x_t differ by (1 - sigma) of it: by nothing at sigma = 1."""
        return noisy_latents + (1 - _per_sample(self.noise_level(timesteps), prediction)) * prediction

    def to_clean(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The latents that a prediction stands for, x_0 = x_t - sigma v."""
        return noisy_latents - _per_sample(self.noise_level(timesteps), prediction) * prediction

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) sigma^2 with SNR = ((1 - sigma) / sigma)^2: v errs by 1 / sigma of what x_0 errs by."""
        sigma = self.noise_level(timesteps)
        return torch.minimum((1 - sigma).square(), gamma * sigma.square())

    def draw_timestep(self, generator: torch.Generator, latent_shape: Sequence[int] = ()) -> Tensor:
        if self.density == "logit_normal":
            sigma = torch.sigmoid(self.logit_mean + self.logit_std * torch.randn((), generator=generator))
        else:
            sigma = torch.rand((), generator=generator)
        if self.density == "mode":  # Esser et al. 2024, section 3.1
            sigma = 1 - sigma - self.mode_scale * (torch.cos(math.pi / 2 * sigma).square() - 1 + sigma)
        shift = self.shift(latent_shape) if callable(self.shift) else self.shift
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return (sigma * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)


@dataclass(frozen=True)
class Draws:
    """All that is random about B samples in one step."""

    timesteps: Tensor  # (B,) int64 in [0, T)
    noise: Tensor  # (B, C, H, W)
    posterior_noise: Tensor  # (B, C, H, W), for sampling the VAE's posterior
    offset_noise: Tensor  # (B, C, 1, 1)
    uniform: Tensor  # (B,) in [0, 1): a caption is dropped where it is below the dropout rate

    def to(self, device: torch.device) -> Draws:
        """The same on a device, for which the host does not wait."""
        return Draws(*(sent(getattr(self, name), device) for name in self.__dataclass_fields__))


def draw(
    seed: int, stream: Stream, step: int, places: Sequence[int], latent_shape: Sequence[int], process: NoiseProcess
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
                process.draw_timestep(generator, latent_shape),
                torch.randn(*latent_shape, generator=generator),
                torch.randn(*latent_shape, generator=generator),
                torch.randn(channels, 1, 1, generator=generator),
                torch.rand((), generator=generator),
            )
        )
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))
