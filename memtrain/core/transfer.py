"""Tensors on their way to a device, for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on this device, any shape; the copy is made when the device comes to it.

    A GPU copies by itself only from memory that cannot be moved, so what is sent there goes through such.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
