"""Adapters of tiny models: made, moved away from their beginning, exported."""

from pathlib import Path

import torch

from memtrain.models.adapters import LowRank
from memtrain.models.base import DiffusionModel, trained_parameters
from memtrain.models.pretrained import from_pretrained


def low_rank(**options) -> LowRank:
    defaults = dict(rank=4, alpha=None, dropout=0.0, target_modules="attention", text_encoder=False, use_dora=False)
    return LowRank(**(defaults | dict(merge=False, formats=["diffusers"]) | options))


def adapted(pipeline: Path, seed: int = 7, **options) -> tuple[DiffusionModel, LowRank]:
    """A model with an adapter, as at the start of a run."""
    options_of_model = dict(train_text_encoder=False, gradient_checkpointing=False, channels_last=False, compile=False)
    model = from_pretrained(str(pipeline), "auto", **options_of_model)
    adapter = low_rank(**options)
    adapter.attach(model, seed)
    return model, adapter


def moved(pipeline: Path, **options) -> tuple[DiffusionModel, LowRank]:
    """The same with other weights than it begins with, as if it had learnt."""
    model, adapter = adapted(pipeline, **options)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    return model, adapter
