"""What the model is asked to learn from a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.models.base import DiffusionModel

DENOMINATORS = ("kept", "all")


@dataclass(frozen=True)
class Objective:
    """How losses are weighed and divided, and what is done to captions and noise before: the config's `loss`.

    Args:
        denominator: divide the summed loss by the `kept` samples of the optimizer step, or by `all`.
        caption_dropout: share of captions replaced by the empty one.
        min_snr_gamma: gamma of the min-SNR weights; None weights every timestep alike.
        noise_offset: amplitude of offset noise, one value a channel (Guttenberg 2023); 0 for none.
    """

    denominator: str
    caption_dropout: float
    min_snr_gamma: float | None
    noise_offset: float

    def __post_init__(self) -> None:
        if self.denominator not in DENOMINATORS:
            raise ValueError(f"loss.denominator must be one of {', '.join(DENOMINATORS)}, got {self.denominator}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"loss.caption_dropout is a share in [0, 1], got {self.caption_dropout:g}")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"loss.min_snr_gamma must be > 0 or null, got {self.min_snr_gamma:g}")

    def weights(self, timesteps: Tensor, model: DiffusionModel) -> Tensor:
        """The weight of each sample's loss, which depends on its timestep alone. (B,) int64 -> (B,) float32"""
        if self.min_snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        return model.noise_process.min_snr_weights(timesteps, self.min_snr_gamma)
