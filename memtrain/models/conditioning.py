"""What a network is told about captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

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
        values = (getattr(self, field.name) for field in fields(self))
        return Conditioning(*(None if value is None else change(value) for value in values))

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
        columns = zip(*([getattr(part, field.name) for field in fields(part)] for part in parts), strict=True)
        return Conditioning(*(None if column[0] is None else torch.cat(column) for column in columns))
