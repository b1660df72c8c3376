"""Adapters as files: written for other programs, read into a stock pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedModel

from memtrain.models.folders import KOHYA_FILE, check_lora
from memtrain.models.kohya_flux import to_kohya

ADAPTER = "default"  # peft's name of the adapter in training
FORMATS = ("diffusers", "kohya")


def write_lora(
    pipeline: type[DiffusionPipeline],
    networks: dict[str, nn.Module],
    scale: float,
    folder: Path,
    dtype: torch.dtype,
    formats: tuple[str, ...],
) -> None:
    """Write the adapters of networks into `folder`, as diffusers' `load_lora_weights` reads them, and as kohya-ss'
    scripts and ComfyUI do.

    B is multiplied by `scale`, so that the adapter is W + B A for every reader, whatever it knows of alpha.

    Args:
        pipeline: whose adapters they are.
        networks: by the names that the pipeline has for them.
        scale: alpha / rank.
    """
    from peft import get_peft_model_state_dict

    layers: dict[str, dict[str, Tensor]] = {}
    for name, network in networks.items():
        # transformers 5 has CLIP's layers one level higher than it had, and than files have them
        prefix = "text_model." if isinstance(network, CLIPTextModel) and not hasattr(network, "text_model") else ""
        state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
        layers[name] = {
            prefix + key: (tensor.detach() * (scale if "lora_B" in key else 1)).to("cpu", dtype).contiguous()
            for key, tensor in state.items()
        }
    if "diffusers" in formats:
        pipeline.save_lora_weights(folder, **{f"{name}_lora_layers": state for name, state in layers.items()})
    if "kohya" in formats:
        from diffusers.utils import convert_state_dict_to_kohya

        transformer = layers.pop("transformer", None)  # Flux.1's
        state = (
            convert_state_dict_to_kohya(
                {f"{name}.{key}": tensor for name, state in layers.items() for key, tensor in state.items()}
            )
            if layers
            else {}
        )
        if transformer is not None:
            whole: Any = networks["transformer"]
            state |= to_kohya(transformer, lambda layer: whole.get_submodule(layer).out_features)
        if "text_encoder_2" not in networks:  # the only one of a model has no number
            state = {key.replace("lora_te1_", "lora_te_"): tensor for key, tensor in state.items()}
        (folder / KOHYA_FILE).parent.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / KOHYA_FILE)


def load_lora(pipeline: DiffusionPipeline, source: str, *, key: str = "lora") -> None:
    """Load an adapter into a pipeline by the pipeline's own `load_lora_weights`, and leave it active.

    Args:
        source: a folder that a run has exported, or a .safetensors file of diffusers' or kohya-ss' form.
        key: what the user called `source`; for errors.

    Raises:
        ValueError: there is none, or it was made for another base.
    """
    file, said = check_lora(key, source), f"{key}={source}"
    try:
        state = load_file(file)
        lost = next((name for name in state if _is_lost(name)), None)
        if lost is not None:
            raise ValueError(f"diffusers leaves out {lost}, norms of DoRA, in this form; give a merged pipeline")
        if not hasattr(pipeline, "load_lora_weights"):
            raise ValueError(f"a {type(pipeline).__name__} takes none")
        unet = getattr(pipeline, "unet", None)
        found = pipeline.lora_state_dict(dict(state), unet_config=None if unet is None else unet.config)
        _check_fit(pipeline, found[0] if isinstance(found, tuple) else found)  # a UNet's comes with alphas
        pipeline.load_lora_weights(str(file))
    except Exception as error:  # whatever diffusers, peft or a damaged file raise; all end in one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{said} cannot be loaded: {reason}") from error


def _is_lost(name: str) -> bool:
    """Whether diffusers passes over a tensor of an adapter and says no more than a warning."""
    return "dora_scale" in name or (name.startswith("text_encoder") and "lora_magnitude_vector" in name)


def _check_fit(pipeline: DiffusionPipeline, state: dict[str, Tensor]) -> None:
    """Raises ValueError with the first key, of an adapter in diffusers' form, that no layer of the pipeline fits."""
    every = {name: getattr(pipeline, name, None) for name in pipeline._lora_loadable_modules}
    networks = {name: network for name, network in every.items() if network is not None}
    for key in state:
        if key.split(".")[0] not in networks:
            raise ValueError(f"{key} is of no network of a {type(pipeline).__name__}; it was made for another base")
    for name, network in networks.items():
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        for key, tensor in _as_peft_names(network, own).items():
            layer, _, part = key.partition(".lora_")
            shape = _shape(network, layer)
            fits = shape is not None and {
                "A": tensor.shape[1:] == shape[1:],
                "B": tensor.shape[:1] == shape[:1],
            }.get(part[:1], True)
            if not fits:
                there = "there is no such layer" if shape is None else f"that layer has weights {tuple(shape)}"
                raise ValueError(
                    f"{name}.{key} {tuple(tensor.shape)} does not fit: {there}; it was made for another base"
                )


def _as_peft_names(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by the layer's name, `.lora_A` and `.lora_B`; alphas left out."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    state = {key: tensor for key, tensor in state.items() if not key.endswith(".alpha")}
    if not state or all("lora_A" in key or "lora_B" in key or "magnitude" in key for key in state):
        named = state
    elif isinstance(network, PreTrainedModel):
        named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    else:
        named = convert_unet_state_dict_to_peft(state)
    if hasattr(network, "text_model") or not isinstance(network, PreTrainedModel):
        return named
    return {key.removeprefix("text_model."): tensor for key, tensor in named.items()}  # as diffusers does


def _shape(network: nn.Module, layer: str) -> torch.Size | None:
    """Of the weights of a network's layer; None: there is none, or it has none."""
    try:
        weight = network.get_submodule(layer).weight
    except AttributeError:
        return None
    return weight.shape if isinstance(weight, Tensor) else None
