"""Pictures and the latents of a model, one made of the other, in batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser


@torch.no_grad()
def encode_images(denoiser: Denoiser, images: np.ndarray, batches: ShrinkingBatches) -> Tensor:
    """(R, height, width, 3) uint8 -> (R, C, H, W) scaled mean latents, float32, on the CPU."""
    model = denoiser.model

    def work(rows: range) -> Tensor:
        pixels = torch.from_numpy(images[rows.start : rows.stop]).permute(0, 3, 1, 2)  # (B, 3, height, width)
        mean, std = model.encode_posterior(pixels.to(denoiser.device))
        return model.sample_latents(mean, std, torch.zeros_like(std)).cpu()

    return torch.cat(list(batches.over(len(images), work)))


def decode_latents(denoiser: Denoiser, latents: Tensor, batches: ShrinkingBatches) -> np.ndarray:
    """(R, C, H, W) scaled latents -> (R, height, width, 3) uint8."""
    return np.concatenate(
        list(
            batches.over(
                len(latents),
                lambda rows: denoiser.model.decode(latents[rows.start : rows.stop].to(denoiser.device)),
            )
        )
    )
