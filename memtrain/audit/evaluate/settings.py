"""What decides the figures of a finished model, beside the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from memtrain.audit.alignment import ClipScore
from memtrain.audit.attack import Attack
from memtrain.audit.denoiser import Denoiser
from memtrain.audit.evaluate.fid import Features
from memtrain.audit.evaluate.similarity import Similarity
from memtrain.core.copies import checked_false_copies

REFERENCE_GROUP = "reference"  # as training names it in canaries.csv


@dataclass(frozen=True)
class Settings:
    """What decides a model's figures, beside the samples and the measures."""

    num_images_per_prompt: int
    num_inference_steps: int
    guidance_scale: float | None  # None: the family's own
    timesteps_per_sample: int
    fid_samples: int  # pictures of the shards
    false_copies: float  # share of the generations of the group reference that may count as copies
    nearest: int | None  # training pictures that are searched; None: all
    gallery: int  # pairs
    seed: int
    attack: Attack = field(default_factory=Attack)  # what brings pictures back, beside captions

    def __post_init__(self):
        for name in ("num_images_per_prompt", "num_inference_steps", "timesteps_per_sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("fid_samples", "gallery"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.nearest is not None and self.nearest < 1:
            raise ValueError(f"nearest must be >= 1, got {self.nearest}; null searches all pictures of the shards")
        checked_false_copies(self.false_copies)


class Margin(Protocol):
    """What says how much of its caption each picture shows, as `memtrain.audit.margin.CaptionMargin`."""

    def check(self, denoiser: Denoiser) -> None:
        """Raises ValueError where it cannot judge what this model draws."""
        ...

    def identity(self) -> str: ...

    def scores(self, pixels: np.ndarray, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(R, height, width, 3) uint8, R captions and seeds of its noise -> (R,)"""
        ...


@dataclass(frozen=True)
class Measures:
    similarity: Similarity
    features: Features  # of the distances between many pictures
    alignment: ClipScore | None
    margin: Margin | None = None
