"""Pictures from the model in training, through the stock pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from memtrain.callbacks.logging import from_all_ranks, share_of_rank
from memtrain.core.copies import latent_rmse
from memtrain.core.streams import Stream, place_seed
from memtrain.models.base import DiffusionModel
from memtrain.training.encoded import EncodedSamples


@dataclass(frozen=True)
class Compared:
    """A generation held against the training sample that its caption belongs to."""

    sample: int  # row of the samples
    generation: int
    rmse: float  # of the latents
    latents: Tensor | None  # (C, h, w), where they were asked for


@torch.no_grad()
def generate(
    trainer: pl.Trainer,
    model: DiffusionModel,
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    latent_shape: tuple[int, int, int],
    num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Generate once from each prompt, from start noise of a seed of its own.

    Args:
        pipeline: the model's.

    Returns:
        Latents (B, C, h, w), float32 on the CPU.
    """
    start = torch.stack([torch.randn(*latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    height, width = (side * model.scale_factor for side in latent_shape[1:])  # XL is told of them
    # a compiled UNet would be compiled anew for what a pipeline calls it with
    with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        latents = pipeline(
            prompt=list(prompts),
            height=height,
            width=width,
            latents=model.to_pipeline(start.to(pipeline.device)),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            **model.call_options,
        ).images
    return model.from_pipeline(latents.float(), height, width).cpu()


def compare(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    samples: EncodedSamples,
    wanted: Sequence[tuple[int, int]],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    with_latents: bool,
) -> list[Compared]:
    """Generate from the captions, the work shared by the ranks, and measure the distance to the samples.

    A generation's start noise depends on (seed, sample, generation) alone.

    Args:
        samples: with their latents.
        wanted: (row of the samples, number of the generation) of each.
        with_latents: whether the generated latents are returned.

    Returns:
        All ranks' generations, on every rank, in the order of `wanted`.
    """
    latents, index, captions, _ = samples
    pipeline, positions = pl_module.model.pipeline(), index.tolist()
    mine = share_of_rank(trainer, list(enumerate(wanted)))
    found = []
    for first in range(0, len(mine), batch_size):
        part = mine[first : first + batch_size]
        rows = [n for _, (n, _) in part]
        generated = generate(
            trainer,
            pl_module.model,
            pipeline,
            [captions[n] for n in rows],
            [place_seed(pl_module.seed, Stream.GENERATION, positions[n], g) for _, (n, g) in part],
            pl_module.latent_shape,
            num_inference_steps,
            guidance_scale,
        )
        rmse = latent_rmse(generated, latents[rows])  # (B,)
        for (place, (n, g)), distance, image in zip(part, rmse.tolist(), generated, strict=True):
            found.append((place, Compared(n, g, distance, image.clone() if with_latents else None)))
    return [one for _, one in sorted(from_all_ranks(trainer, found), key=lambda placed: placed[0])]
