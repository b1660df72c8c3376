"""Adapters of Flux.1 by kohya-ss' names for its layers, some of which are several of diffusers'."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_KINDS = {"transformer_blocks": ("double_blocks", _DOUBLE), "single_transformer_blocks": ("single_blocks", _SINGLE)}


def without_name(layers: Iterable[str]) -> str | None:
    """The first of a transformer's layers that has no name there."""
    return next((layer for layer in layers if _named(layer) is None), None)


def to_kohya(state: dict[str, Tensor], num_outputs: Callable[[str], int]) -> dict[str, Tensor]:
    """An adapter's tensors by kohya-ss' names.

    A fused layer's A are its parts' A on top of each other, (parts rank, inputs), and its B has theirs on a diagonal,
    (outputs of all parts, parts rank); a part without an adapter has zeros. Alpha is the rank, so that B A counts as it
    is.

    Args:
        state: LAYER.lora_A.weight (rank, inputs) and LAYER.lora_B.weight (outputs, rank), of layers that have a name.
        num_outputs: of a layer of the transformer.
    """
    found: dict[str, Tensor] = {}
    for layer in dict.fromkeys(key.partition(".lora_")[0] for key in state):
        name, parts = _named(layer) or (layer, (layer,))
        if f"{name}.alpha" in found:
            continue
        own = state[f"{layer}.lora_A.weight"]
        downs = [state.get(f"{part}.lora_A.weight", torch.zeros_like(own)) for part in parts]
        ups = [
            state.get(f"{part}.lora_B.weight", own.new_zeros(num_outputs(part), len(own))) for part in parts
        ]  # a part is of the same rank as the others
        found[f"{name}.lora_down.weight"] = torch.cat(downs)
        found[f"{name}.lora_up.weight"] = torch.block_diag(*ups)
        found[f"{name}.alpha"] = torch.tensor(float(len(parts) * len(own)))
    return found


def _named(layer: str) -> tuple[str, tuple[str, ...]] | None:
    """kohya-ss' name for what a layer is a part of, and all of its parts; None: it has none."""
    split = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
    if split is None or split[1] not in _KINDS:
        return None
    blocks, names = _KINDS[split[1]]
    for name, parts in names.items():
        if split[3] in parts:
            return f"lora_unet_{blocks}_{split[2]}_{name}", tuple(f"{split[1]}.{split[2]}.{part}" for part in parts)
    return None
