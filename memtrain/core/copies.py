"""When a generation is a copy: by its distance to a training picture, at a cut that a run sets for itself.

Shapes: Q generations, P training pictures, D features of a picture (of latents C x H x W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from memtrain.core.statistics import threshold_at_fpr

DEFAULT_MAX_RMSE = 0.5  # of pictures in another style than the demo's, copies lie at .20 to .45, others at .5 to 1.2
DEFAULT_FALSE_COPIES = 0.01

_QUERIES_AT_ONCE = 256  # a float64 of each, and their distances to a block, are all that a search holds beside them

Verdict = TypeVar("Verdict", covariant=True)


class Distance(Protocol[Verdict]):
    """What can be compared with a number: a number itself, a tensor or an array."""

    def __le__(self, other: float, /) -> Verdict: ...


@dataclass(frozen=True)
class Cut:
    """The distance up to which a generation is a copy, and what set it."""

    distance: float
    bound: float
    generations: int  # from captions that were never trained on, which set it
    false_copies: float  # the share of them that may count

    @property
    def why(self) -> str:
        """What set it, in words."""
        if self.generations == 0:
            return "the bound alone, since nothing was generated from captions that were never trained on"
        of = f"of {self.generations} generations from never-trained captions count"
        few = (
            f"at most {100 * self.false_copies:g} % {of}"
            if self.generations * self.false_copies >= 1
            else f"none {of}s"
        )
        return f"the bound; {few}" if self.distance == self.bound else f"where {few}"


def checked_max_rmse(max_rmse: float, key: str = "max_rmse") -> float:
    """The bound that a config gives under `key`. Raises ValueError where nothing could be a copy."""
    if not max_rmse > 0:  # not `max_rmse <= 0`: NaN must not pass
        raise ValueError(f"{key} must be > 0, got {max_rmse:g}; {DEFAULT_MAX_RMSE:g} is usual")
    return float(max_rmse)


def checked_false_copies(false_copies: float, key: str = "false_copies") -> float:
    """The share that a config gives under `key`. Raises ValueError where it is none."""
    if not 0 <= false_copies < 1:
        raise ValueError(f"{key} is a share in [0, 1), got {false_copies:g}; {DEFAULT_FALSE_COPIES:g} is usual")
    return float(false_copies)


def copy_cut(chance: Tensor, bound: float = DEFAULT_MAX_RMSE, false_copies: float = DEFAULT_FALSE_COPIES) -> Cut:
    """The largest distance within which at most the share `false_copies` of chance's lie, and never above `bound`.

    Where `false_copies` of them are less than one generation, it is the largest within which none lies.

    Args:
        chance: (Q,) of each generation from a caption that was never trained on, its distance to the nearest of all
            training pictures. Where it is empty the bound alone decides.
    """
    chance = chance[~chance.isnan()].double()
    # copies are the near ones: what is at or above the lowest threshold of minus the distance
    distance = _in_float32(-threshold_at_fpr(-chance, false_copies)) if len(chance) else bound
    return Cut(min(bound, distance), bound, len(chance), false_copies)


def _in_float32(value: float) -> float:
    """The largest number of single precision that is not above a value: a tensor of that precision is held against it
    as a number of double precision is.
    """
    rounded = torch.tensor(value, dtype=torch.float32)
    return (rounded if rounded.item() <= value else rounded.nextafter(torch.tensor(-torch.inf))).item()


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


def rmse_of_all(latents: Tensor, pictures: Tensor) -> Tensor:
    """The same of each generation to each picture: (Q, C, H, W), (P, C, H, W) -> (Q, P) float64."""
    apart = torch.cdist(latents.flatten(1).double(), pictures.flatten(1).double())  # (Q, P)
    return apart / latents[0].numel() ** 0.5


def nearest(
    generations: Tensor, blocks: Iterable[Tensor], distances: Callable[[Tensor, Tensor], Tensor] = rmse_of_all
) -> tuple[Tensor, Tensor]:
    """Search all pictures for the nearest one of each generation, exactly and block by block.

    Args:
        generations: (Q, …)
        blocks: the pictures, some at a time, (P, …) each; a block may be empty.
        distances: (q, …) and (P, …) -> (q, P).

    Returns:
        The distance (Q,) float64, and which it is of all blocks' pictures, the first where several are as near:
        (Q,) int64. Where there is no picture: infinity, and -1.
    """
    least = torch.full((len(generations),), torch.inf, dtype=torch.float64)
    which, seen = torch.full((len(generations),), -1, dtype=torch.int64), 0
    for block in blocks:
        for first in range(0, len(generations) if len(block) else 0, _QUERIES_AT_ONCE):
            rows = slice(first, first + _QUERIES_AT_ONCE)
            value, place = distances(generations[rows], block).double().min(dim=1)
            nearer = value < least[rows]
            least[rows] = torch.where(nearer, value, least[rows])
            which[rows] = torch.where(nearer, place + seen, which[rows])
        seen += len(block)
    return least, which


def is_copy(rmse: Distance[Verdict], cut: float) -> Verdict:
    """Whether a generation at this distance, see `latent_rmse`, is a copy: a number, tensor or array, of any shape."""
    return rmse <= cut


def copy_rate(rmse: Tensor, cut: float) -> float:
    """The share of generations that are copies. (B,) -> float, `nan` where there is none"""
    return is_copy(rmse, cut).double().mean().item()
