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
    pooled: Tensor | None = None  # (B, P), Stable Diffusion XL
    time_ids: Tensor | None = None  # (B, 6), Stable Diffusion XL: original size, crop, target size

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same change made to all that there is."""
        return replace(self, **{name: change(value) for name, value in vars(self).items() if value is not None})

    def __len__(self) -> int:
        return len(self.hidden)

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
