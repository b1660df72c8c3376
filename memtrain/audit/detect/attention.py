"""Cross-attention of the network that predicts, read while it predicts by hooks that are gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class CrossAttention:
    """What the cross-attention layers of one forward showed of its last B rows, those with the prompt."""

    def __init__(self, end_positions: Tensor):
        self.end_positions = end_positions  # (B,) int64, place of the end-of-text token
        self._token_means: list[Tensor] = []  # a layer: (B, L)
        self._end_maps: list[Tensor] = []  # a layer: (B, pixels)

    def add(self, query: Tensor, key: Tensor, heads: int, scale: float) -> None:
        """A layer's projections, (2B, pixels, D) and (2B, L, D). Reduced at once: maps are large."""
        rows = len(self.end_positions)
        query, key = (part[-rows:].float().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key))
        probabilities = (query @ key.transpose(-1, -2) * scale).softmax(dim=-1).mean(dim=1)  # (B, pixels, L)
        self._token_means.append(probabilities.mean(dim=1))
        index = self.end_positions[:, None, None].expand(-1, probabilities.shape[1], 1)
        self._end_maps.append(probabilities.gather(-1, index)[..., 0])

    def token_means(self) -> Tensor:
        """Attention that each token gets, averaged over layers, heads and places. (B, L)"""
        return torch.stack(self._token_means).mean(dim=0)

    def end_map(self, height: int, width: int) -> Tensor:
        """Attention that the end-of-text token gets from each place, averaged over heads and over the
        layers of the highest resolution (Chen et al., ICLR 2025), brought to (B, height, width)."""
        pixels = max(layer.shape[1] for layer in self._end_maps)
        finest = torch.stack([layer for layer in self._end_maps if layer.shape[1] == pixels]).mean(dim=0)
        rows = round((pixels * height / width) ** 0.5)
        maps = finest.reshape(len(finest), 1, rows, pixels // rows)
        return nn.functional.interpolate(maps, (height, width), mode="bilinear", align_corners=False)[:, 0]


@contextmanager
def cross_attention(network: nn.Module, end_positions: Tensor) -> Iterator[CrossAttention]:
    """Watch the one forward made inside; its last len(end_positions) rows are looked at.

    Raises:
        ValueError: the network has no cross-attention, or hides its projections (fused ones).
    """
    seen = CrossAttention(end_positions)
    layers = cross_attention_layers(network)
    hooks, projections = [], {}

    def note(layer: Attention, name: str):
        return lambda module, inputs, output: projections.__setitem__((layer, name), output)

    def reduce(layer: Attention, inputs, output) -> None:
        query, key = (projections.pop((layer, name), None) for name in ("to_q", "to_k"))
        if query is None or key is None:
            raise ValueError("attention scores need plain projections; call pipeline.unfuse_qkv_projections() first")
        seen.add(query, key, layer.heads, layer.scale)

    try:
        for layer in layers:
            hooks.append(layer.to_q.register_forward_hook(note(layer, "to_q")))
            hooks.append(layer.to_k.register_forward_hook(note(layer, "to_k")))
            hooks.append(layer.register_forward_hook(reduce))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def cross_attention_layers(network: nn.Module) -> list[Attention]:
    """Raises ValueError where there are none."""
    layers = [module for module in network.modules() if isinstance(module, Attention) and module.is_cross_attention]
    if not layers:
        raise ValueError(
            f"a {type(network).__name__} has no cross-attention; "
            "leave attention_entropy and bright_ending out of scores"
        )
    return layers


def end_positions(token_ids: Tensor, end_token: int) -> Tensor:
    """Place of the first end-of-text token of each row, (B, L) -> (B,); padding often repeats it."""
    return (token_ids == end_token).int().argmax(dim=1)
