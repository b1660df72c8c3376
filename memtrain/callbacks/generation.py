"""Pictures from the model in training, through the stock pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from memtrain.models.base import DiffusionModel


@torch.no_grad()
def generate(
    trainer: pl.Trainer,
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    latent_shape: tuple[int, int, int],
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Latents (B, C, H, W), float32 on the CPU, of one generation a prompt, each from a seed of its own."""
    start = torch.stack(
        [torch.randn(*latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    with trainer.precision_plugin.forward_context():
        latents = pipeline(
            list(prompts),
            latents=start.to(pipeline.device),
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
    return latents.float().cpu()


@torch.no_grad()
def decode(model: DiffusionModel, latents: Tensor) -> np.ndarray:
    """(B, C, H, W) scaled latents -> (B, R, R, 3) uint8."""
    pixels = model.vae.decode((latents / model.vae.config.scaling_factor).to(model.vae.device, model.vae.dtype)).sample
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
