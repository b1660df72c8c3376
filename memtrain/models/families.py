"""The model families, by the class of their stock pipeline. Imports nothing slow: commands ask before torch is there.

A family that is not named here is neither trained nor audited. Each has a choice in conf/model, called as the file
that its class lies in.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What can be known of a model family without importing it."""

    path: str  # of its class, a `memtrain.models.base.DiffusionModel`
    parts: tuple[str, ...]  # folders that a pipeline of it has beside its model_index.json
    optional: tuple[str, ...] = ()  # parts that a pipeline of it may lack
    left_out: Mapping[str, Any] = field(default_factory=dict)  # of the stock pipeline, what neither needs

    @property
    def choice(self) -> str:
        """What `model=` calls it."""
        return self.path.split(".")[-2]

    def load(self) -> type:
        """The family's class."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)


_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
FAMILIES = {
    "StableDiffusionPipeline": Family(
        "memtrain.models.stable_diffusion.StableDiffusion",
        _PARTS,
        left_out=dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False),
    ),
    "StableDiffusionXLPipeline": Family(
        "memtrain.models.stable_diffusion_xl.StableDiffusionXL",
        (*_PARTS, "text_encoder_2", "tokenizer_2"),
    ),
    "StableDiffusion3Pipeline": Family(
        "memtrain.models.stable_diffusion_3.StableDiffusion3",
        ("transformer", *_PARTS[1:], "text_encoder_2", "tokenizer_2"),
        optional=("text_encoder_3", "tokenizer_3"),
        left_out=dict(image_encoder=None, feature_extractor=None),
    ),
    "FluxPipeline": Family(
        "memtrain.models.flux.Flux",
        ("transformer", *_PARTS[1:], "text_encoder_2", "tokenizer_2"),
        left_out=dict(image_encoder=None, feature_extractor=None),
    ),
    "Flux2KleinPipeline": Family("memtrain.models.flux2_klein.Flux2Klein", ("transformer", *_PARTS[1:])),
}


def family_of(pipeline: Any) -> Family | None:
    """The family of a pipeline in hand; one's own subclass of a stock pipeline is of that one's."""
    names = (kind.__name__ for kind in type(pipeline).__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)
