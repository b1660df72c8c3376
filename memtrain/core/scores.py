"""Scores: one number per sample that tells how much of it is memorized."""

from __future__ import annotations

from torch import Tensor


def text_conditional_magnitude(noise_pred_cond: Tensor, noise_pred_null: Tensor) -> Tensor:
    """d = || eps(x_t, t, c) - eps(x_t, t, null) ||_2 per sample, in float32 (Wen et al., ICLR 2024, eq. 2).

    Args:
        noise_pred_cond: (B, ...) noise predicted with the caption.
        noise_pred_null: (B, ...) noise predicted with the empty caption, at the same x_t and t. Other
            parameterisations are converted first (`memtrain.core.diffusion.to_noise`).

    Returns:
        (B,) float32. Grows with the square root of the number of latent elements.

    Raises:
        ValueError: the two shapes differ.
    """
    if noise_pred_cond.shape != noise_pred_null.shape:
        raise ValueError(
            "noise_pred_cond and noise_pred_null must have one shape, got "
            f"{tuple(noise_pred_cond.shape)} and {tuple(noise_pred_null.shape)}"
        )
    return (noise_pred_cond.float() - noise_pred_null.float()).flatten(1).norm(dim=1)  # (B,)
