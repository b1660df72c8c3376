"""Stable Diffusion 3's transformer with one zero token for the many that stand in T5's place.

Text tokens of an MMDiT have no positions, so n that start alike stay alike in every layer: in a softmax over keys they
weigh sum_n exp(q k) = exp(q k + log n), as one key whose logit is log n larger, and their values are one value. What
comes out is the same up to rounding, for a quarter of the tokens of a small picture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def count_zero_tokens(transformer: SD3Transformer2DModel, count: int) -> None:
    """Have the transformer, called by whomever on a CPU, take one text token for the last `count` if all are zeros.

    All of them are taken where they may come to differ: an adapter's dropout, or each to have a gradient of its own.
    What `save_pretrained` writes is not changed.
    """

    def shorten(network: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = named["encoder_hidden_states"]  # (B, L, D)
        if hidden.device.type != "cpu" or hidden.requires_grad or hidden[:, -count:].any():
            return given, named
        if any(isinstance(layer, nn.Dropout) and layer.training and layer.p for layer in network.modules()):
            return given, named
        told = {**(named.get("joint_attention_kwargs") or {}), "last_count": count}
        return given, {**named, "encoder_hidden_states": hidden[:, : 1 - count], "joint_attention_kwargs": told}

    transformer.set_attn_processor(CountedJointAttention())
    transformer.register_forward_pre_hook(shorten, with_kwargs=True)


class CountedJointAttention(JointAttnProcessor2_0):
    """The stock processor; called with `last_count` = n > 1, the last of L text tokens stands for n.

    The count comes through `joint_attention_kwargs`; without it, and in attention of the picture to itself, it is the
    stock processor to the last bit.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        last_count: int = 1,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, P, D) picture and (B, L, D) text tokens -> what attention adds to each, of the same shapes."""
        if last_count == 1 or encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        picture = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        text = _heads(
            attn,
            encoder_hidden_states,
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.norm_added_q, attn.norm_added_k),
        )
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(picture, text, strict=True))  # (B, h, P + L, d)
        bias = query.new_zeros(key.shape[2])  # (P + L,), the same for every query
        bias[-1] = math.log(last_count)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(query.shape[2], -1))
        seen, read = attended.transpose(1, 2).flatten(2).split([hidden_states.shape[1], text[0].shape[2]], dim=1)
        for layer in attn.to_out:
            seen = layer(seen)
        return seen, read if attn.context_pre_only else attn.to_add_out(read)


def _heads(attn: Attention, tokens: Tensor, projections: tuple, norms: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of tokens (B, N, D), each (B, h, N, d); queries and keys normalised where a norm is."""
    query, key, value = (
        projection(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for projection in projections
    )
    query, key = (part if norm is None else norm(part) for part, norm in zip((query, key), norms, strict=True))
    return query, key, value
