"""What decides the figures of a finished model, and what they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from memtrain.audit.alignment import ClipScore
from memtrain.audit.attack import Attack
from memtrain.audit.evaluate.fid import Features
from memtrain.audit.evaluate.judging import GroupResult
from memtrain.audit.evaluate.similarity import Similarity
from memtrain.core.copies import checked_false_copies

REFERENCE_GROUP, CANARY_GROUP = "reference", "canary"  # as training names them in canaries.csv


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


@dataclass(frozen=True)
class Measures:
    similarity: Similarity
    features: Features  # of the distances between many pictures
    alignment: ClipScore | None


@dataclass(frozen=True)
class ModelResult:
    model: str  # short name
    source: str  # folder or hub id
    measure: str  # of similarity
    copy_rule: str
    cut: float  # of the measure, and what set it
    cut_is: str
    searched: int  # training pictures
    groups: list[GroupResult]
    heldout_loss: float | None  # of the reference group; None: there is none
    frechet_name: str
    frechet_distance: float | None
    kernel_distance: float | None  # on the same features
    frechet_generated: int  # pictures on either side
    frechet_real: int
    identity: str
    lora: str | None = None  # a folder or file that was loaded into it
    attack: str = "none"  # in words

    @property
    def memorization(self) -> GroupResult:
        """The group whose copies count: canaries, else the first that was trained on."""
        trained = [group for group in self.groups if group.group != REFERENCE_GROUP]
        return next((group for group in trained if group.group == CANARY_GROUP), (trained or self.groups)[0])


@dataclass(frozen=True)
class Match:
    """A generation and the training image whose caption it was made from, each (height, width, 3) uint8."""

    caption: str
    key: str
    group: str
    generated: np.ndarray
    original: np.ndarray
    said: str  # how near they are
    is_copy: bool
    attacked: bool = False  # made from what an attack found, not from the caption


@dataclass(frozen=True)
class Found:
    """All that was found out about one model."""

    result: ModelResult
    rows: pa.Table  # a row a generation
    pairs: list[Match]  # nearest to their training image, nearest first
