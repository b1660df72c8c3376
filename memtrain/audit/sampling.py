"""The sampling path: B generations from noise to pictures by the model's sampler, guided towards the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.audit.denoiser import Denoiser
from memtrain.models.conditioning import Conditioning
from memtrain.models.samplers import Predictions

# (number of the step, timestep, x_t) -> what is predicted with the prompt and with the empty one
PredictPair = Callable[[int, float, Tensor], Predictions]


@dataclass(frozen=True)
class PathStep:
    """What one step of the path shows, before its latents move on."""

    index: int  # of the steps, from 0
    timesteps: list[float]  # of all steps of the schedule
    latents: Tensor  # (B, C, H, W) x_t
    predicted: Predictions

    @property
    def t(self) -> float:
        return self.timesteps[self.index]


class SamplingPath:
    """The way of B generations; iterating over it makes the steps, `latents` is where it has come to.

    After the last step `latents` are those of the finished pictures. Who iterates may break off, or set `weight`, w of
    null + w (cond - null), a number or (B, 1, 1, 1), for the step that is being looked at and those after it.

    Args:
        latents: (B, C, H, W) x_T.
        cond: what the network is told about the B prompts.
        guidance_scale: as the stock pipeline takes it; None is the family's own.
        num_inference_steps: of the schedule.
        stop: make the first so many steps alone; None makes all.
        predict: stands in for the prediction with `cond` and the empty prompt.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        cond: Conditioning,
        guidance_scale: float | None,
        num_inference_steps: int,
        stop: int | None = None,
        predict: PredictPair | None = None,
    ):
        denoiser = denoiser.guided(guidance_scale)
        self.denoiser, self.latents = denoiser, latents
        self.weight: float | Tensor = denoiser.model.guidance_weight(denoiser.guidance_scale)
        self.num_inference_steps, self.stop = num_inference_steps, stop
        null = denoiser.model.null(len(cond))
        self.predict = predict or (lambda index, t, latents: denoiser.predict_pair(latents, t, cond, null))

    def __iter__(self) -> Iterator[PathStep]:
        sampler = self.denoiser.model.sampler
        timesteps = sampler.timesteps(self.num_inference_steps)
        for index, t in enumerate(timesteps[: self.stop]):
            step = PathStep(index, timesteps, self.latents, self.predict(index, t, self.latents))
            yield step
            with torch.no_grad():  # how the path depends on the prompt is not followed
                self.latents = sampler.step(self.latents, timesteps, index, step.predicted, self.weight)


def generate(
    denoiser: Denoiser,
    cond: Conditioning,
    seeds: list[int],
    num_inference_steps: int,
    guidance_scale: float | None,
) -> Tensor:
    """Scaled latents (B, C, H, W) of one generation a prompt, each from a seed of its own."""
    path = SamplingPath(denoiser, denoiser.noise(seeds), cond, guidance_scale, num_inference_steps)
    with torch.no_grad():
        for _ in path:
            pass
    return path.latents
