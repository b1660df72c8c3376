"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP text encoder, a VAE, DDPM's noise."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn

from memtrain.core.diffusion import DDPM, PREDICTION_TYPES
from memtrain.core.transfer import sent
from memtrain.models.base import DiffusionModel
from memtrain.models.conditioning import Conditioning
from memtrain.models.families import FAMILIES
from memtrain.models.samplers import DDIM


class StableDiffusion(DiffusionModel):
    """Stable Diffusion 1.x and 2.x, v-prediction included. See `DiffusionModel`."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    network_name = "unet"
    text_encoder_names: tuple[str, ...] = ("text_encoder",)
    tokenizer_names: tuple[str, ...] = ("tokenizer",)
    packing: ClassVar[int] = 1  # latents of a channel that the network takes as channels of one place
    unet: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        self._check_channels(type(pipeline).__name__)
        self._set_process(type(pipeline).__name__)
        # of a pipeline whose modules are brought to the GPU one by one: where they are brought to
        self.noise_process.to(pipeline._execution_device)

    def _check_channels(self, name: str) -> None:
        """Raises ValueError where the network of a pipeline of this class name takes more or other than latents."""
        config: Any = self.network.config
        if config.in_channels != (config.out_channels or config.in_channels):
            raise ValueError(f"this {name} takes a picture too (inpainting, upscaling)")
        given = None if self.vae is None else self.vae.config.latent_channels * self.packing
        if given not in (None, config.in_channels):
            raise ValueError(
                f"the {self.network_name} of this {name} takes {config.in_channels} channels and its VAE gives {given}"
            )

    def _set_process(self, name: str) -> None:
        """Noise process and sampler. Raises ValueError where a pipeline of this class name cannot be used."""
        if self.unet.config.time_cond_proj_dim is not None:
            raise ValueError(f"this {name} is guidance-distilled and has no unconditional prediction")
        config = self.scheduler.config
        if config.get("beta_schedule") is None and config.get("trained_betas") is None:
            raise ValueError(f"this {name} has no noise of DDPM's: its scheduler is a {type(self.scheduler).__name__}")
        if self.vae is not None and self.vae.config.get("latents_mean") is not None:
            raise ValueError(f"the VAE of this {name} shifts its latents by a mean of its own (latents_mean)")
        schedule = DDPMScheduler.from_config(config)
        if schedule.config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"this {name} predicts {schedule.config.prediction_type}")
        self.noise_process = DDPM(schedule.alphas_cumprod.float(), schedule.config.prediction_type)
        self.sampler = DDIM(self.noise_process, config)

    # ---- pictures

    @property
    def native_shape(self) -> tuple[int, int, int]:
        side = self.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return self.unet.config.in_channels, height, width

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        multiple = self.scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        for name, side in (("data.resolution", height), ("data.bucket_multiple", width)):
            if side < multiple or side % multiple:
                name = "data.resolution" if height == width else name
                raise ValueError(f"{name} must be a multiple of {multiple} for this model, got {side}")
        return self.vae.config.latent_channels, height // self.scale_factor, width // self.scale_factor

    @torch.no_grad()
    def encode_posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with self._vae_in_range():
            pixel_values = (images.float() / 127.5 - 1).to(self.vae.dtype)
            posterior = self.vae.encode(pixel_values).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def sample_latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        return (mean + std * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        with self._vae_in_range():
            unscaled = self._unscaled(latents).to(self.device, self.vae.dtype)
            pixels = self.vae.decode(unscaled, return_dict=False)[0]
        # (B, 3, height, width) in [-1, 1] -> (B, height, width, 3) in 0..255
        return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor

    def _vae_in_range(self) -> AbstractContextManager[None]:
        """The VAE in a precision that its activations do not overflow, meanwhile."""
        return nullcontext()

    # ---- captions and predictions

    def _encode(self, captions: list[str]) -> Conditioning:
        tokens, mask = self._tokens(captions, self.tokenizer), None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = sent(tokens.attention_mask, self.device)
        return Conditioning(self.text_encoder(sent(tokens.input_ids, self.device), attention_mask=mask)[0])

    def _call(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        added = (
            None
            if conditioning.pooled is None
            else {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        )
        return self.unet(noisy_latents, timesteps, conditioning.hidden, added_cond_kwargs=added, return_dict=False)[0]

    # ---- what comes of it

    def pipeline(self) -> DiffusionPipeline:
        pipeline = self.pipeline_class(
            **{name: getattr(self, name) for name in (*self.network_names, *self.tokenizer_names)},
            scheduler=self.sampler.stock_scheduler(),
            **self._pipeline_options(),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _pipeline_options(self) -> dict:
        """What else the stock pipeline is made with."""
        return dict(FAMILIES[self.pipeline_class.__name__].left_out)

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        pipeline = self.pipeline()
        pipeline.register_modules(
            scheduler=self.scheduler,
            **{name: _as_written(getattr(self, name), dtype) for name in self.network_names},
        )
        pipeline.save_pretrained(folder, safe_serialization=True)


def _as_written(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network on the CPU in this precision; of weights that are so already it has no copy, but shares them."""

    def written(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()

    memo: dict[int, Any] = {id(p): nn.Parameter(written(p), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, memo | {id(buffer): written(buffer) for buffer in network.buffers()})
