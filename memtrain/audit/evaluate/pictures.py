"""Pictures, as what is measured on them takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """B pictures, generated or read."""

    latents: Tensor  # (B, C, H, W) scaled, float32, on the CPU
    pixels: np.ndarray  # (B, height, width, 3) uint8

    def __len__(self) -> int:
        return len(self.pixels)
