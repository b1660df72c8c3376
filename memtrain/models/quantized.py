"""Networks whose linear layers hold their weights in 4 or 8 bits, through bitsandbytes: a base that an adapter stands
beside, and that stays as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

KINDS = ("nf4", "int8")
_BLOCK = 64  # weights that share a scale in nf4
_OUTLIER = 6.0  # int8: columns of the input with larger numbers are multiplied in 16 bits (Dettmers et al. 2022)


def check_kind(kind: str) -> None:
    """Raises ValueError where there is no such kind, or bitsandbytes is not installed."""
    if kind not in KINDS:
        raise ValueError(f"model.quantization must be one of {', '.join(KINDS)}, or null, got {kind}")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError(
            f"model.quantization={kind} needs bitsandbytes: pip install bitsandbytes, or leave it out"
        ) from None


def quantize(network: nn.Module, kind: str) -> None:
    """Put linear layers of this kind in the place of those of `can_be_packed`, on the CPU; all else stays.

    nf4: 4 bits, normal float, a scale a block (Dettmers et al. 2023). int8: 8 bits, a scale a row.
    """
    import bitsandbytes

    check_kind(kind)
    for name, layer in [(name, layer) for name, layer in network.named_modules() if can_be_packed(layer, kind)]:
        options: dict[str, Any] = dict(bias=layer.bias is not None, device="meta")
        weight = layer.weight.detach()
        if kind == "nf4":
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, quant_type=kind, compress_statistics=False, **options
            )
            packed.weight = bitsandbytes.nn.Params4bit(
                weight, quant_type=kind, compress_statistics=False, blocksize=_BLOCK, module=packed
            ).to("cpu")
            packed.support_avx512bf16_for_cpu = False  # it would pack weights anew for a forward without a gradient
        else:
            packed = bitsandbytes.nn.Linear8bitLt(
                layer.in_features, layer.out_features, has_fp16_weights=False, threshold=_OUTLIER, **options
            )
            packed.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        packed.bias = layer.bias
        network.set_submodule(name, packed.train(layer.training))
    network.is_loaded_in_4bit = kind == "nf4"  # type: ignore[assignment] # what peft goes by
    network.is_loaded_in_8bit = kind == "int8"  # type: ignore[assignment]


def can_be_packed(layer: nn.Module, kind: str) -> bool:
    """Whether this is a linear layer, and for nf4 one whose rows are whole blocks: bitsandbytes 0.50.2 reads others
    back wrongly on a CPU. Those of the public models all are."""
    return type(layer) is nn.Linear and (kind != "nf4" or layer.in_features % _BLOCK == 0)


def compute_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Have layers in 4 bits compute in this precision; else the first input that they see decides it."""
    for layer in network.modules():
        if hasattr(layer, "compute_type_is_set"):
            vars(layer).update(compute_dtype=dtype, compute_type_is_set=True)


def packed_bytes(shape: Sequence[int], kind: str) -> int:
    """What a linear layer's weights (out, in) take, scales among them."""
    count = math.prod(shape)
    if kind == "nf4":
        return math.ceil(count / 2) + 4 * math.ceil(count / _BLOCK)
    return count + 4 * shape[0]
