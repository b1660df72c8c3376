"""Scores: one number per sample that tells how much of it is memorized."""

from __future__ import annotations

import torch
from torch import Tensor

MAGNITUDE, ANCHORED = "magnitude", "anchored"
SCORES = (MAGNITUDE, ANCHORED)  # that training takes


def text_conditional_magnitude(noise_pred_cond: Tensor, noise_pred_null: Tensor) -> Tensor:
    """d = || eps(x_t, t, c) - eps(x_t, t, null) ||_2 per sample, in float32 (Wen et al., ICLR 2024, eq. 2).

    Args:
        noise_pred_cond: (B, ...) noise predicted with the caption.
        noise_pred_null: (B, ...) noise predicted with the empty caption, at the same x_t and t. Other
            parameterisations are converted first (`memtrain.core.diffusion.NoiseProcess.to_noise`).

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


def anchored_magnitude(noise_pred: Tensor, noise_pred_base: Tensor) -> Tensor:
    """a = || eps_theta(x_t, t, c) - eps_base(x_t, t, c) ||_2 per sample: what a run has learnt about a caption.

    Args:
        noise_pred: (B, ...) noise predicted with the caption.
        noise_pred_base: (B, ...) by the weights that the run began with, at the same x_t, t and caption. Both are
            converted from other parameterisations first, as for `text_conditional_magnitude`, whose norm this is.

    Returns:
        (B,) float32; 0 before anything is learnt.
    """
    return text_conditional_magnitude(noise_pred, noise_pred_base)


def anisotropy(
    magnitude: Tensor, low_noise_cond: Tensor, low_noise_null: Tensor, gamma: tuple[float, float] = (1.0, 2.0)
) -> Tensor:
    """gamma_1 d + gamma_2 cos(eps_null, eps_cond - eps_null) (Asthana & Belagiannis, ICLR 2026).

    Args:
        magnitude: (B,) the text-conditional magnitude d.
        low_noise_cond, low_noise_null: (B, ...) predicted at a low timestep, at the x_t where d was taken.
        gamma: weights; (1, 2) for Stable Diffusion 1.

    Returns:
        (B,) float32; 0 where the prompt changes nothing.
    """
    null = low_noise_null.float().flatten(1)
    difference = low_noise_cond.float().flatten(1) - null
    return gamma[0] * magnitude + gamma[1] * torch.cosine_similarity(null, difference, dim=1)  # (B,)


def cross_attention_entropy(probabilities: Tensor) -> Tensor:
    """- sum_i a_i log a_i, a_i the attention that token i gets on average (Ren et al., ECCV 2024, eq. 3).

    Args:
        probabilities: (B, ..., L) over L tokens; what lies between (layers, heads, places) is averaged.

    Returns:
        (B,) float32 in [0, log L].
    """
    mean = probabilities.float().reshape(len(probabilities), -1, probabilities.shape[-1]).mean(dim=1)  # (B, L)
    return torch.special.entr(mean).sum(dim=1)


def bright_ending(difference: Tensor, mask: Tensor) -> Tensor:
    """|| difference o mask ||_2 / mean(mask) (Chen et al., ICLR 2025, eq. 5): d where the ending is bright.

    Args:
        difference: (B, C, H, W) eps_cond - eps_null.
        mask: (B, H, W), the attention that the end-of-text token gets from each place at the last step.

    Returns:
        (B,) float32; d itself where the mask is even.
    """
    mask = mask.float()
    weighted = (difference.float() * mask[:, None]).flatten(1).norm(dim=1)
    return weighted / mask.flatten(1).mean(dim=1).clamp(min=1e-12)


def sharpness(score_difference: Tensor, shifted_score_difference: Tensor) -> Tensor:
    """|| Ds(x + delta Ds(x)) - Ds(x) ||_2, Ds = s_cond - s_null (Jeon et al., ICML 2025): curvature along Ds.

    Args:
        score_difference: (B, ...) Ds at x; a score is s = -eps / sqrt(1 - abar).
        shifted_score_difference: (B, ...) Ds at x + delta Ds(x).

    Returns:
        (B,) float32, about delta times the norm of the Hessian's product with Ds.
    """
    return (shifted_score_difference.float() - score_difference.float()).flatten(1).norm(dim=1)
