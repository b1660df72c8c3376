"""Scores of prompts, averaged over chosen steps of the sampling path and over generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser
from memtrain.audit.sampling import PredictPair, SamplingPath
from memtrain.models.conditioning import Conditioning

FIRST_STEPS = (0, 1, 2, 3, 4)  # one step alone ranks the words of the demo's canaries much less reliably


@dataclass(frozen=True)
class ScoredPath:
    """Where on the sampling path, guided towards the prompt.

    The reference implementation swaps the two predictions when it advances the latents, so that its scores
    after the first step lie on a path that is guided away from the prompt; these do not.
    """

    steps: tuple[int, ...] = FIRST_STEPS  # of num_inference_steps, counted from 0
    num_inference_steps: int = 50
    guidance_scale: float | None = None  # the family's own

    def __post_init__(self):
        if not self.steps or not all(0 <= step < self.num_inference_steps for step in self.steps):
            raise ValueError(
                f"steps must be one or more of 0 to {self.num_inference_steps - 1}, of num_inference_steps; "
                f"got {list(self.steps)}"
            )

    def sampling(
        self, denoiser: Denoiser, cond: Conditioning, seeds: list[int], predict: PredictPair | None = None
    ) -> SamplingPath:
        """The path from these seeds as far as the last of the steps; `predict` as there."""
        schedule = self.guidance_scale, self.num_inference_steps
        return SamplingPath(denoiser, denoiser.noise(seeds), cond, *schedule, max(self.steps) + 1, predict)


@torch.no_grad()
def mean_scores(
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[Sequence[int]],
    path: ScoredPath,
    batches: ShrinkingBatches,
) -> list[float]:
    """d of each prompt, mean over the chosen steps and over generations from its seeds."""
    rows = [(prompt, seed) for prompt, own in zip(prompts, seeds, strict=True) for seed in own]
    if not rows:
        return []

    def work(chosen: range) -> Tensor:
        part = [rows[row] for row in chosen]
        cond, own = denoiser.encode([prompt for prompt, _ in part]), [seed for _, seed in part]
        scores = [
            step.predicted.magnitude.cpu() for step in path.sampling(denoiser, cond, own) if step.index in path.steps
        ]
        return torch.stack(scores, dim=1).mean(dim=1)  # (rows,)

    scores = torch.cat(list(batches.over(len(rows), work)))
    return [part.mean().item() for part in scores.split([len(own) for own in seeds])]
