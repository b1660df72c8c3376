"""What a network is told about captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the network is told about B captions; a family leaves out what its network does not take."""

    hidden: Tensor  # (B, L, D) encoder_hidden_states
    pooled: Tensor | None = None  # (B, P), Stable Diffusion XL and 3, Flux
    time_ids: Tensor | None = None  # (B, 6), Stable Diffusion XL: original size, crop, target size
    guidance: Tensor | None = None  # (B,), Flux.1 dev: the guidance scale that it was distilled to draw with

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same change made to all that there is."""
        return replace(self, **{name: change(value) for name, value in vars(self).items() if value is not None})

    def __len__(self) -> int:
        return len(self.hidden)

    def sized(self, time_ids: Tensor | None) -> Conditioning:
        """The same captions, of pictures of these sizes, (B, 6); as they are where nothing is told of sizes."""
        is_told = self.time_ids is not None and time_ids is not None
        return replace(self, time_ids=time_ids) if is_told else self

    def guided(self, guidance_scale: float) -> Conditioning:
        """The same captions at this guidance scale; as they are where the network is told of none."""
        if self.guidance is None:
            return self
        return replace(self, guidance=torch.full_like(self.guidance, guidance_scale))

    def where(self, mask: Tensor, other: Conditioning) -> Conditioning:
        """These rows where a mask (B,) is True, elsewhere those of another."""
        names = [name for name, value in vars(self).items() if value is not None]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return replace(self, **{
            name: torch.where(mask.reshape(-1, *[1] * (ours.ndim - 1)), ours, theirs)
            for name, (ours, theirs) in pairs.items()
        })  # fmt: skip

    def index(self, rows: list[int] | Tensor) -> Conditioning:
        """These rows, or those where a mask is True."""
        return self.map(lambda value: value[rows])

    def expand(self, count: int) -> Conditioning:
        """One caption, `count` rows of it that share memory."""
        return self.map(lambda value: value.expand(count, *value.shape[1:]))

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        """The rows of one after those of the other."""
        first = parts[0]
        names = [name for name, value in vars(first).items() if value is not None]
        return replace(first, **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
