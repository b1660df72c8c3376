"""Samples as latents, to be looked at again and again outside the order of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memtrain.data.datamodule import DataModule
from memtrain.models.base import DiffusionModel


@torch.no_grad()
def encode_samples(
    model: DiffusionModel, data: DataModule, positions: Sequence[int], batch_size: int = 32
) -> tuple[Tensor, Tensor, list[str]]:
    """Mean latents (N, C, H, W) on the CPU, positions (N,) on the device and captions of readable samples."""
    device = model.alphas_cumprod.device
    latents, index, captions = [], [], []
    for first in range(0, len(positions), batch_size):
        batch = data.decode(positions[first : first + batch_size])
        valid = batch.valid
        images = batch.images[valid].to(device)
        if len(images) == 0:
            continue
        mean, std = model.encode_posterior(images)
        latents.append(model.sample_latents(mean, std, torch.zeros_like(std)).cpu())
        index.append(batch.sample_index[valid])
        captions += [caption for caption, ok in zip(batch.captions, valid.tolist(), strict=True) if ok]
    if not index:
        shape = model.latent_shape(*data.samples.sizes[0])
        return torch.zeros(0, *shape), torch.zeros(0, dtype=torch.long, device=device), []
    return torch.cat(latents), torch.cat(index).to(device), captions
