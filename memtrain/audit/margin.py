"""Does a generation show what its caption says? As another diffusion model finds it, where there is no CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser
from memtrain.audit.pictures import encode_images
from memtrain.core.streams import Stream, place_seed

_MARGIN_TIMESTEPS = (100, 200, 300, 400, 500, 600, 700, 800, 900)  # of 1000


def check_judge(judge: Denoiser, denoiser: Denoiser) -> None:
    """Raises ValueError where a judge knows pictures of another size than a model draws."""
    sizes = [one.model.own_size for one in (denoiser, judge)]
    if sizes[0] != sizes[1]:
        drawn, judged = (f"{width} x {height}" for height, width in sizes)
        raise ValueError(f"judge draws {judged} px and the model {drawn}; name a judge of the model's size")


@dataclass(frozen=True)
class CaptionMargin:
    """`caption_margin` by a judge at hand, a model that has memorized nothing of what is judged."""

    judge: Denoiser
    batches: ShrinkingBatches

    def check(self, denoiser: Denoiser) -> None:
        check_judge(self.judge, denoiser)

    def identity(self) -> str:
        return self.judge.fingerprint()

    def scores(self, pixels: np.ndarray, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(R, height, width, 3) uint8, R captions and seeds of the noise -> (R,) on the CPU."""
        return caption_margin(self.judge, pixels, captions, seeds, self.batches)


def caption_margin(
    judge: Denoiser, images: np.ndarray, prompts: Sequence[str], seeds: Sequence[int], batches: ShrinkingBatches
) -> Tensor:
    """`latents_margin` of R pictures, (R, height, width, 3) uint8. (R,)"""
    return latents_margin(judge, encode_images(judge, images, batches), prompts, seeds, batches)


@torch.no_grad()
def latents_margin(
    judge: Denoiser, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int], batches: ShrinkingBatches
) -> Tensor:
    """(R,) by how much the prompt lowers another model's denoising loss on a picture: 1 - loss_c / loss_null.

    A stand-in for a CLIP score where there is no CLIP: how much of the prompt a judge that has memorized
    nothing finds in the picture, over fixed timesteps and noise (the idea of Li et al. 2023, *Your Diffusion
    Model is Secretly a Zero-Shot Classifier*). Negative where the picture shows something else.

    Args:
        latents: (R, C, H, W) scaled.
    """

    def work(rows: range) -> Tensor:
        clean, count = latents[rows.start : rows.stop].to(judge.device), len(rows)
        cond, null = judge.encode([prompts[row] for row in rows]), judge.model.null(count)
        losses = torch.zeros(2, count, device=judge.device)
        for t in _MARGIN_TIMESTEPS:
            noise = judge.noise([place_seed(seeds[row], Stream.MARGIN, t, 0) for row in rows])
            steps = torch.full((count,), t, device=judge.device)
            noisy = judge.model.noise_process.add_noise(clean, noise, steps)
            pair = judge.predict_pair(noisy, t, cond, null)
            for loss, predicted in zip(losses, (pair.noise_cond, pair.noise_null), strict=True):
                loss += (predicted - noise).square().flatten(1).mean(dim=1)
        return (1 - losses[0] / losses[1]).cpu()

    return torch.cat(list(batches.over(len(latents), work)))
