"""Samplers: the steps of the stock pipelines from noise to a picture, made of what a network predicts.

Shapes: B rows, C x H x W latents.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from memtrain.core.diffusion import DDPM, RectifiedFlow
from memtrain.core.scores import text_conditional_magnitude


@dataclass(frozen=True)
class Predictions:
    """What is predicted for B rows with the prompt and with the empty one, (B, C, H, W) each, float32."""

    cond: Tensor  # as the network gives it: what a step is made of
    null: Tensor
    noise_cond: Tensor  # what scores compare (`NoiseProcess.comparable`)
    noise_null: Tensor

    @property
    def magnitude(self) -> Tensor:
        """(B,) the text-conditional magnitude d."""
        return text_conditional_magnitude(self.noise_cond, self.noise_null)

    @property
    def difference(self) -> Tensor:
        """(B, C, H, W) what the prompt changes; d is its norm."""
        return self.noise_cond - self.noise_null

    def detach(self) -> Predictions:
        return Predictions(*(value.detach() for value in vars(self).values()))


class Sampler(ABC):
    """A deterministic path from noise to a picture, guided towards the prompt.

    Guided is null + guidance_scale (cond - null) (Ho & Salimans 2022).
    """

    @abstractmethod
    def stock_scheduler(self) -> Any:
        """A scheduler of diffusers that draws what this one draws."""

    @abstractmethod
    def timesteps(self, num_inference_steps: int) -> list[float]:
        """The stock pipeline's, falling; whole numbers (int) but for a flow."""

    @abstractmethod
    def step(
        self,
        latents: Tensor,
        timesteps: list[float],
        index: int,
        predicted: Predictions,
        guidance_scale: float | Tensor,
    ) -> Tensor:
        """Latents at timesteps[index] -> those at the next one, or of the picture after the last."""

    @abstractmethod
    def identity(self) -> bytes:
        """What decides its path, but for the number of steps."""


class DDIM(Sampler):
    """DDIM with eta = 0 (Song et al. 2021, eq. 12), whichever scheduler of DDPM's noise a pipeline came with.

    Args:
        process: of the model.
        config: of the pipeline's scheduler.
    """

    def __init__(self, process: DDPM, config: Mapping[str, Any]):
        self.process, self.config = process, config
        self.scheduler = self.stock_scheduler()  # of our own: the pipeline's has state

    def stock_scheduler(self) -> DDIMScheduler:
        return DDIMScheduler.from_config(self.config, clip_sample=False)

    def timesteps(self, num_inference_steps: int) -> list[float]:
        self.scheduler.set_timesteps(num_inference_steps)
        return self.scheduler.timesteps.tolist()

    def step(
        self,
        latents: Tensor,
        timesteps: list[float],
        index: int,
        predicted: Predictions,
        guidance_scale: float | Tensor,
    ) -> Tensor:
        t, process = int(timesteps[index]), self.process
        noise = predicted.noise_null + guidance_scale * (predicted.noise_cond - predicted.noise_null)
        before = t - self.scheduler.config.num_train_timesteps // len(timesteps)
        alpha = process.alphas_cumprod[t]
        alpha_before = process.alphas_cumprod[before] if before >= 0 else self.scheduler.final_alpha_cumprod.to(alpha)
        if process.prediction_type == "v_prediction" and process.is_all_noise(torch.tensor(t)):
            clean, noise = -noise, latents  # v = -x_0 there, and it is v that was compared
        else:
            clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        return alpha_before.sqrt() * clean + (1 - alpha_before).sqrt() * noise

    def identity(self) -> bytes:
        schedule = self.process.alphas_cumprod.cpu().numpy().tobytes()
        return schedule + self.process.prediction_type.encode() + _of_config(self.scheduler.config)


class Euler(Sampler):
    """Euler's steps along a rectified flow: x <- x + (sigma' - sigma) v, down to sigma' = 0.

    Args:
        process: of the model.
        config: of the pipeline's scheduler: its shift, and what else shapes its sigmas.
        schedule: num_inference_steps -> what the stock pipeline gives `FlowMatchEulerDiscreteScheduler.set_timesteps`:
            that number or `sigmas`, maybe `mu`.
    """

    def __init__(self, process: RectifiedFlow, config: Mapping[str, Any], schedule: Callable[[int], dict[str, Any]]):
        self.process, self.config, self.schedule = process, config, schedule
        self.scheduler = self.stock_scheduler()

    def stock_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler.from_config(self.config, stochastic_sampling=False)

    def timesteps(self, num_inference_steps: int) -> list[float]:
        """t = sigma T - 1, which is exact in float32."""
        self.scheduler.set_timesteps(**self.schedule(num_inference_steps))
        return (self.scheduler.timesteps - 1).tolist()

    def step(
        self,
        latents: Tensor,
        timesteps: list[float],
        index: int,
        predicted: Predictions,
        guidance_scale: float | Tensor,
    ) -> Tensor:
        v = predicted.null + guidance_scale * (predicted.cond - predicted.null)
        sigma, before = self.process.noise_level(torch.tensor([*timesteps, -1.0])[index : index + 2]).tolist()
        return latents + (before - sigma) * v

    def identity(self) -> bytes:
        options = {name: value for name, value in self.schedule(50).items() if name != "num_inference_steps"}
        return _of_config({**self.scheduler.config, **options})


def _of_config(config: Mapping[str, Any]) -> bytes:
    told = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.dumps(told, sort_keys=True, default=str).encode()
