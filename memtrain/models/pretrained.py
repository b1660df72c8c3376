"""A model to train, of the family that its folder or hub id is of."""

from __future__ import annotations

import torch

from memtrain.models.base import DiffusionModel
from memtrain.models.families import FAMILIES
from memtrain.models.folders import trained
from memtrain.models.pipelines import load_pipeline


def from_pretrained(
    pretrained: str,
    family: str,
    train_text_encoder: bool,
    gradient_checkpointing: bool,
    channels_last: bool,
    compile: bool,
) -> DiffusionModel:
    """Load a model whose predicting network is trained and whose VAE is frozen.

    Args:
        pretrained: diffusers folder or hub id.
        family: that it has to be of, by its choice in conf/model; auto: any.
        train_text_encoder: train the text encoders too; else they are frozen.
        gradient_checkpointing: recompute activations in backward; slower, far less memory.
        channels_last: the network's memory format that convolutions prefer on recent GPUs.
        compile: `torch.compile` the network, for each size of picture twice: once for the forward that is trained, of
            one batch size, and once for forwards without a gradient, of any. Pipelines sample without it.

    Raises:
        ValueError: in one line, what is wrong with `pretrained`.
    """
    kind = trained(family)
    pipeline = load_pipeline(pretrained, kind, torch.float32, key="model.pretrained")
    try:
        model = FAMILIES[type(pipeline).__name__].load()(pipeline)
    except ValueError as error:
        raise ValueError(f"model.pretrained={pretrained}: {error}; {kind.remedy}") from None
    model.make_trainable(train_text_encoder, gradient_checkpointing, channels_last, compile)
    return model
