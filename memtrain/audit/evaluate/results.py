"""The figures of a finished model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from memtrain.audit.evaluate.judging import GroupResult
from memtrain.audit.evaluate.settings import REFERENCE_GROUP

CANARY_GROUP = "canary"  # as training names it in canaries.csv


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
    attack_reach: float | None = None  # of the measure: what is nearer, it does not describe by itself

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
