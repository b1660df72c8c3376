"""When a generation is a copy of its training image: by the distance of their latents."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

DEFAULT_MAX_RMSE = 0.25  # no generation of the demo's from captions that were never trained on lies so near


Verdict = TypeVar("Verdict", covariant=True)


class Distance(Protocol[Verdict]):
    """What can be compared with a number: a number itself, a tensor or an array."""

    def __le__(self, other: float, /) -> Verdict: ...


def checked_max_rmse(max_rmse: float, key: str = "max_rmse") -> float:
    """The bound that a config gives under `key`. Raises ValueError where nothing could be a copy."""
    if not max_rmse > 0:  # not `max_rmse <= 0`: NaN must not pass
        raise ValueError(f"{key} must be > 0, got {max_rmse:g}; {DEFAULT_MAX_RMSE:g} is usual")
    return float(max_rmse)


def latent_rmse(latents: Tensor, originals: Tensor) -> Tensor:
    """Root mean square difference between generations' latents and those of their training images.

    The distance of Carlini et al. 2023, *Extracting Training Data from Diffusion Models*, section 4.1, normalised
    by the number of elements: scaled latents have unit variance, so that two unrelated pictures lie around 1.4
    apart whatever their size.

    Args:
        latents, originals: (B, C, H, W), scaled.

    Returns:
        (B,)
    """
    return (latents - originals).square().flatten(1).mean(dim=1).sqrt()


def is_copy(rmse: Distance[Verdict], max_rmse: float = DEFAULT_MAX_RMSE) -> Verdict:
    """Whether a generation at this distance, see `latent_rmse`, is a copy: a number, tensor or array, of any shape."""
    return rmse <= max_rmse


def copy_rate(rmse: Tensor, max_rmse: float = DEFAULT_MAX_RMSE) -> float:
    """The share of generations that are copies. (B,) -> float, `nan` where there is none"""
    return is_copy(rmse, max_rmse).double().mean().item()
