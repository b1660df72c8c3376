"""What transformers on a rectified flow have in common: how sigma is drawn and stepped along, latents with a shift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from memtrain.core.diffusion import RectifiedFlow
from memtrain.models.samplers import Euler
from memtrain.models.stable_diffusion import StableDiffusion


class FlowTransformer(StableDiffusion):
    """A transformer that is told sigma and predicts v. Pictures are encoded and exported as in Stable Diffusion.

    What is drawn untold is as large as the VAE's config says, the 1024 px of
    all that were published.
    """

    network_name = "transformer"
    patch = 2  # a token is of so many rows and columns of latents
    transformer: Any

    def _transformed(self, of_rows: dict[str, Tensor | None], **shared: Any) -> Tensor:
        """What the transformer makes of B rows of each of these and of what is the same for all; one compiled graph
        serves any B where no gradient is taken."""
        if self.compiled and not torch.is_grad_enabled():
            for told in of_rows.values():
                if told is not None:
                    torch._dynamo.maybe_mark_dynamic(told, 0)
        return self.transformer(**of_rows, **shared, return_dict=False)[0]

    def _set_process(self, name: str) -> None:
        config = self.scheduler.config
        if "FlowMatch" not in type(self.scheduler).__name__:
            raise ValueError(f"this {name} has a {type(self.scheduler).__name__}, which is of no rectified flow")
        shift = self._shift if config.get("use_dynamic_shifting") else config.shift
        self.noise_process = RectifiedFlow(config.num_train_timesteps, shift=shift)
        self.sampler = Euler(self.noise_process, config, self._schedule)

    # ---- sigma

    def _mu(self, latent_shape: Sequence[int], num_inference_steps: int) -> float:
        """What a scheduler with dynamic shifting is told of pictures with latents (C, H, W)."""
        config = self.scheduler.config
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(self._tokens_of(latent_shape), *(config[name] for name in names))

    def _tokens_of(self, latent_shape: Sequence[int]) -> int:
        """Tokens of a picture."""
        return (latent_shape[1] // self.patch) * (latent_shape[2] // self.patch)

    def _shift(self, latent_shape: Sequence[int]) -> float:
        """The shift of sigma that comes of mu."""
        mu = self._mu(latent_shape, num_inference_steps=50)
        return math.exp(mu) if self.scheduler.config.time_shift_type == "exponential" else mu

    def _schedule(self, num_inference_steps: int) -> dict[str, Any]:
        """Sigmas from 1 to 1 / n in even steps, before they are shifted."""
        given: dict[str, Any] = {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()}
        if self.scheduler.config.get("use_flow_sigmas"):
            given = {"num_inference_steps": num_inference_steps}
        return given | {"mu": self._mu(self.own_shape, num_inference_steps)}

    # ---- pictures

    @property
    def native_shape(self) -> tuple[int, int, int]:
        side = (1024 if self.vae is None else self.vae.config.sample_size) // self.scale_factor
        return self.transformer.config.in_channels // self.packing, side, side

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        multiple = self.scale_factor * self.patch
        for name, side in (("data.resolution", height), ("data.bucket_multiple", width)):
            if side < multiple or side % multiple:
                name = "data.resolution" if height == width else name
                raise ValueError(f"{name} must be a multiple of {multiple} for this model, got {side}")
        return self.own_shape[0], height // self.scale_factor, width // self.scale_factor

    def sample_latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        return (mean + std * noise - self._vae_shift) * self.vae.config.scaling_factor

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor + self._vae_shift

    @property
    def _vae_shift(self) -> float:
        return self.vae.config.shift_factor or 0.0
