"""What stock pipelines on a rectified flow predict and draw, of their own modules and methods alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from memtrain.models import flux, flux2_klein

PX = dict(height=16, width=16)  # of what the tiny ones draw


@pytest.fixture(scope="module")
def few_tokens() -> Iterator[None]:
    """Captions of fewer tokens than the stock pipelines', which take most of the time that tiny networks take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux, "T5_TOKENS", 32)
        patch.setattr(flux2_klein, "TOKENS", 32)
        yield


def velocity(pipeline: Any, latents: Tensor, sigma: Tensor, captions: list[str], guidance: float) -> Tensor:
    """v at sigma (B,) of latents (B, C, H, W) with these captions; with a gradient, where there is one to be had."""
    rows, channels, height, width = latents.shape
    if isinstance(pipeline, Flux2KleinPipeline):
        hidden, txt_ids = pipeline.encode_prompt(captions, device="cpu", max_sequence_length=flux2_klein.TOKENS)
        ids = pipeline._prepare_latent_ids(latents)
        told = dict(encoder_hidden_states=hidden, txt_ids=txt_ids, img_ids=ids, guidance=None)
        v = pipeline.transformer(hidden_states=pipeline._pack_latents(latents), timestep=sigma, **told).sample
        return pipeline._unpack_latents_with_ids(v, ids, height, width)
    hidden, pooled, txt_ids = pipeline.encode_prompt(captions, device="cpu", max_sequence_length=flux.T5_TOKENS)
    v = pipeline.transformer(
        hidden_states=pipeline._pack_latents(latents, rows, channels, height, width),
        timestep=sigma,
        guidance=torch.full((rows,), guidance) if pipeline.transformer.config.guidance_embeds else None,
        pooled_projections=pooled,
        encoder_hidden_states=hidden,
        txt_ids=txt_ids,
        img_ids=pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", torch.float32),
    ).sample
    scale = pipeline.vae_scale_factor
    return pipeline._unpack_latents(v, height * scale, width * scale, scale)


def drawn(pipeline: Any, prompts: list[str], seeds: list[int], steps: int, guidance_scale: float, **told) -> Tensor:
    """Latents (B, C, H, W) of pictures drawn from noise of these seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = pipeline(
        prompt=prompts or None, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators,
        output_type="latent", **PX, **told,
    ).images  # fmt: skip
    if isinstance(pipeline, Flux2KleinPipeline):
        return normalised(pipeline, latents)
    return pipeline._unpack_latents(latents, *PX.values(), pipeline.vae_scale_factor)


def scaled(pipeline: Any, images: Tensor, noise: Tensor) -> Tensor:
    """Latents of pictures (B, 3, height, width) uint8, drawn from the VAE's posterior."""
    vae = pipeline.vae
    posterior = vae.encode(images / 127.5 - 1).latent_dist
    if isinstance(pipeline, Flux2KleinPipeline):
        return normalised(pipeline, posterior.mean + posterior.std * pipeline._unpatchify_latents(noise))
    return (posterior.mean + posterior.std * noise - vae.config.shift_factor) * vae.config.scaling_factor


def normalised(pipeline: Flux2KleinPipeline, latents: Tensor) -> Tensor:
    """What its transformer takes of its VAE's latents."""
    bn = pipeline.vae.bn
    mean, std = bn.running_mean, (bn.running_var + pipeline.vae.config.batch_norm_eps).sqrt()
    return (pipeline._patchify_latents(latents) - mean[:, None, None]) / std[:, None, None]
