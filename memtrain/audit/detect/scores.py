"""The scores of detection: of what one step shows, or of a prompt's finished pictures.

Shapes: B rows (generations), n generations of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from memtrain.audit.denoiser import Denoiser
from memtrain.audit.detect.attention import CrossAttention
from memtrain.audit.sampling import PathStep
from memtrain.core import scores as equations
from memtrain.models.conditioning import Conditioning


@dataclass(frozen=True)
class ScoredStep(PathStep):
    """One scored step of B rows, and what was shown to the network."""

    prompts: list[str]  # B
    cond: Conditioning
    null: Conditioning
    attention: CrossAttention | None  # where a score reads it


class StepScore:
    """A score of each generation at each scored step. Subclass it; higher means memorized."""

    name: str
    extra_evaluations = 0  # of the network, a generation and scored step, beyond the shared pair
    reads_attention = False  # at the scored steps
    to_the_end = False  # needs the last step of the schedule

    def at(self, denoiser: Denoiser, step: ScoredStep) -> Tensor:
        """(B,), of what one step shows."""
        raise NotImplementedError

    def at_end(self, differences: list[Tensor], end_map: Tensor) -> list[Tensor]:
        """(B,) of each scored step, of its eps_cond - eps_null and the last step's end map (B, H, W)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Magnitude(StepScore):
    """Text-conditional magnitude (Wen et al., ICLR 2024)."""

    name = "magnitude"

    def at(self, denoiser: Denoiser, step: ScoredStep) -> Tensor:
        return step.predicted.magnitude


@dataclass(frozen=True)
class Anisotropy(StepScore):
    """d at the step, and the alignment that a second pair shows at the same x_t and a low t.

    `low_place` counts from the schedule's end; 3 as in the authors' code (Asthana & Belagiannis, ICLR 2026).
    """

    gamma: tuple[float, float] = (1.0, 2.0)
    low_place: int = 3
    name = "anisotropy"
    extra_evaluations = 2

    def at(self, denoiser: Denoiser, step: ScoredStep) -> Tensor:
        low = step.timesteps[-min(self.low_place, len(step.timesteps))]
        pair = denoiser.predict_pair(step.latents, low, step.cond, step.null)
        return equations.anisotropy(step.predicted.magnitude, pair.noise_cond, pair.noise_null, self.gamma)


@dataclass(frozen=True)
class AttentionEntropy(StepScore):
    """Entropy of the cross-attention over tokens, all layers (Ren et al., ECCV 2024)."""

    name = "attention_entropy"
    reads_attention = True

    def at(self, denoiser: Denoiser, step: ScoredStep) -> Tensor:
        return equations.cross_attention_entropy(step.attention.token_means())


@dataclass(frozen=True)
class BrightEnding(StepScore):
    """d weighted by the attention of the last step to the end-of-text token (Chen et al., ICLR 2025)."""

    name = "bright_ending"
    to_the_end = True

    def at_end(self, differences: list[Tensor], end_map: Tensor) -> list[Tensor]:
        return [equations.bright_ending(difference, end_map) for difference in differences]


@dataclass(frozen=True)
class Sharpness(StepScore):
    """Curvature along the guidance, by a finite difference of size `delta` (Jeon et al., ICML 2025)."""

    delta: float = 0.1
    name = "sharpness"
    extra_evaluations = 2

    def at(self, denoiser: Denoiser, step: ScoredStep) -> Tensor:
        sigma = denoiser.model.noise_process.noise_level(torch.tensor(step.t, device=denoiser.device))
        difference = -step.predicted.difference / sigma  # of scores: s = -eps / sigma
        moved = step.latents + self.delta * difference
        beside = denoiser.predict_pair(moved, step.t, step.cond, step.null)
        return equations.sharpness(difference, -beside.difference / sigma)


STEP_SCORES: tuple[type[StepScore], ...] = (Magnitude, Anisotropy, AttentionEntropy, BrightEnding, Sharpness)


class Density(Protocol):
    """A score of a prompt's n finished pictures."""

    name: str

    def of_prompt(self, images: np.ndarray) -> float:
        """(n, H, W, 3) uint8."""
