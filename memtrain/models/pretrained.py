"""A model to train, of the family that its folder or hub id is of."""

from __future__ import annotations

import torch

from memtrain.core.diffusion import RectifiedFlow
from memtrain.models.base import DiffusionModel
from memtrain.models.families import FAMILIES
from memtrain.models.flux import Flux
from memtrain.models.folders import Kind, trained
from memtrain.models.pipelines import load_pipeline
from memtrain.models.quantized import quantize
from memtrain.models.t5 import set_t5_padding


def from_pretrained(
    pretrained: str,
    family: str,
    train_text_encoder: bool,
    gradient_checkpointing: bool,
    channels_last: bool,
    compile: bool,
    config: str | None = None,
    quantization: str | None = None,
) -> DiffusionModel:
    """Load a model whose predicting network is trained and whose VAE is frozen.

    Args:
        pretrained: diffusers folder, hub id or .safetensors file.
        family: that it has to be of, by its choice in conf/model; auto: any.
        train_text_encoder: train the text encoders too; else they are frozen.
        gradient_checkpointing: recompute activations in backward; slower, far less memory.
        channels_last: the network's memory format that convolutions prefer on recent GPUs.
        compile: `torch.compile` the network, for each size of picture twice: once for the forward that is trained, of
            one batch size, and once for forwards without a gradient, of any. Pipelines sample without it.
        config: of a file: a diffusers folder or hub id of its family, with configs, tokenizers and what the file lacks.
        quantization: hold the network's linear layers in so many bits, see `memtrain.models.quantized`; for an adapter.

    Raises:
        ValueError: in one line, what is wrong with `pretrained`.
    """
    model = _load(pretrained, trained(family), config)
    model.make_trainable(train_text_encoder, gradient_checkpointing, channels_last, compile)
    if quantization is not None:
        quantize(model.network, quantization)
        model.quantization = quantization
    return model


def flow_from_pretrained(
    pretrained: str,
    family: str,
    train_text_encoder: bool,
    gradient_checkpointing: bool,
    channels_last: bool,
    compile: bool,
    density: str,
    logit_mean: float,
    logit_std: float,
    mode_scale: float,
    shift: float | None,
    config: str | None = None,
    max_sequence_length: int | None = None,
    t5_padding: str = "encoded",
    quantization: str | None = None,
) -> DiffusionModel:
    """Load a model on a rectified flow, as `from_pretrained` does, and say how sigma is drawn in training.

    Args:
        pretrained, family, train_text_encoder, gradient_checkpointing, channels_last, compile, config, quantization:
            as there.
        density, logit_mean, logit_std, mode_scale: see `memtrain.core.diffusion.RectifiedFlow`.
        shift: see there; None is that of the pipeline's scheduler.
        max_sequence_length: tokens of a caption in T5, padding included; None is as the stock pipeline has it.
        t5_padding: what stands for that padding; see `memtrain.models.t5.set_t5_padding`.

    Raises:
        ValueError: in one line, what is wrong with `pretrained` or the density.
    """
    switches = train_text_encoder, gradient_checkpointing, channels_last, compile
    model = from_pretrained(pretrained, family, *switches, config, quantization)
    try:
        if max_sequence_length is not None:
            model.cut_captions(max_sequence_length)
        set_t5_padding(model, t5_padding)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None
    own = model.noise_process
    assert isinstance(own, RectifiedFlow)
    model.noise_process = RectifiedFlow(
        own.num_timesteps, density, logit_mean, logit_std, mode_scale, own.shift if shift is None else shift
    )
    return model


def flux_from_pretrained(
    pretrained: str,
    family: str,
    train_text_encoder: bool,
    gradient_checkpointing: bool,
    channels_last: bool,
    compile: bool,
    density: str,
    logit_mean: float,
    logit_std: float,
    mode_scale: float,
    shift: float | None,
    guidance: float,
    config: str | None = None,
    t5_padding: str = "encoded",
    quantization: str | None = None,
) -> DiffusionModel:
    """Load a Flux, as `flow_from_pretrained` does, and say which guidance scale it is told in training.

    Args:
        guidance: with the caption and with the empty one; see `memtrain.models.flux.Flux`. The others: as there.

    Raises:
        ValueError: in one line, what is wrong with `pretrained`, the density or the guidance.
    """
    if guidance < 0:
        raise ValueError(f"model.guidance must be >= 0, got {guidance:g}; 1 is usual in training")
    switches = train_text_encoder, gradient_checkpointing, channels_last, compile
    model = flow_from_pretrained(
        pretrained,
        family,
        *switches,
        density,
        logit_mean,
        logit_std,
        mode_scale,
        shift,
        config,
        t5_padding=t5_padding,
        quantization=quantization,
    )
    assert isinstance(model, Flux)
    model.guidance = guidance
    return model


def _load(pretrained: str, kind: Kind, config: str | None) -> DiffusionModel:
    pipeline = load_pipeline(pretrained, kind, torch.float32, key="model.pretrained", config=config)
    try:
        return FAMILIES[type(pipeline).__name__].load()(pipeline)
    except ValueError as error:
        raise ValueError(f"model.pretrained={pretrained}: {error}; {kind.remedy}") from None
