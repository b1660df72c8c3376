"""Losses per sample, and the one reduction."""

from __future__ import annotations

import torch
from torch import Tensor


def denoising_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32. (B, C, H, W) x 2 -> (B,)"""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def masked_sum(loss: Tensor, weights: Tensor, keep_mask: Tensor) -> Tensor:
    """sum_i keep_i w_i l_i, a scalar with a graph whatever is kept (docs/method.md, "The right denominator").

    The division by the number of kept samples of the *optimizer step*, over all ranks and micro-batches,
    comes when that number is known. An excluded sample's value is replaced, not multiplied by zero, so a loss
    that is not finite does not enter the sum. It does enter the gradient of weights that all rows share, where
    its zero meets activations that are not finite; so a step with such a row, excluded or not, makes no update
    (`memtrain.training.accumulation`).
    """
    return torch.where(keep_mask, weights * loss, 0.0).sum()
