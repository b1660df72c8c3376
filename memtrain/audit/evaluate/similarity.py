"""How near a generation comes to its training image: SSCD where its file is given, else a named stand-in.

Shapes: B pictures, D features of a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from memtrain.audit.evaluate.pictures import Pictures
from memtrain.audit.torchscript import IMAGENET_MEAN, IMAGENET_STD, file_hash, load_torchscript, run_torchscript
from memtrain.core.copies import (
    DEFAULT_MAX_RMSE,
    Cut,
    checked_max_rmse,
    copy_cut,
    is_copy,
    latent_rmse,
    nearest,
    rmse_of_all,
)

Value = TypeVar("Value", float, Tensor)

RESIZES = ("small_288", "skew_320")  # SSCD's own names


class Similarity(ABC):
    """A measure of how much one picture is another. Deterministic, row by row."""

    name: str  # as it is shown
    column: str  # of the rows
    bound: float  # what is farther than it is no copy
    is_distance: bool  # True: less is nearer

    @abstractmethod
    def features(self, pictures: Pictures) -> Tensor:
        """What is compared, (B, …) float32 on the CPU."""

    @abstractmethod
    def compare(self, features: Tensor, others: Tensor) -> Tensor:
        """(B,) of each pair of rows."""

    @abstractmethod
    def identity(self) -> str:
        """Tells measures that give other values apart."""

    @abstractmethod
    def compare_all(self, features: Tensor, others: Tensor) -> Tensor:
        """Distances of all pairs, however near is measured: less is nearer. (Q, …), (P, …) -> (Q, P)"""

    @abstractmethod
    def is_copy(self, values: np.ndarray, cut: float) -> np.ndarray:
        """Whether generations that are so near are copies at a cut. (B,) -> (B,) bool"""

    def nearest(self, features: Tensor, blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """How near the nearest of all pictures is, and which that is; see `core.copies.nearest`."""
        distances, which = nearest(features, blocks, self.compare_all)
        return self.in_own_terms(distances), which

    def cut(self, chance: Tensor, false_copies: float) -> Cut:
        """What `core.copies.copy_cut` makes of how near chance comes, (R,); its distances are `in_own_terms`, too."""
        return copy_cut(self.in_own_terms(chance), self.in_own_terms(self.bound), false_copies)

    def in_own_terms(self, distance: Value) -> Value:
        """A distance, of which less is nearer, as the measure has it; or the other way round."""
        return distance if self.is_distance else -distance

    def nearness(self, value: float) -> float:
        """Larger is nearer, to sort by."""
        return -self.in_own_terms(value)

    def rule(self, cut: float) -> str:
        """What a copy is, in words."""
        return f"{self.name} {'≤' if self.is_distance else '>'} {cut:.3g}"


class LatentRmse(Similarity):
    """The stand-in that needs no weights but the model's: RMSE of scaled latents, see `core.copies`.

    It knows neither shifts nor flips, and models with different VAEs have different scales.
    """

    name, column, is_distance = "RMSE of latents", "latent_rmse", True

    def __init__(self, max_rmse: float = DEFAULT_MAX_RMSE):
        self.bound = checked_max_rmse(max_rmse)

    def is_copy(self, values: np.ndarray, cut: float) -> np.ndarray:
        return is_copy(values, cut)

    def features(self, pictures: Pictures) -> Tensor:
        return pictures.latents

    def compare(self, features: Tensor, others: Tensor) -> Tensor:
        return latent_rmse(features, others)

    def compare_all(self, features: Tensor, others: Tensor) -> Tensor:
        return rmse_of_all(features, others)

    def identity(self) -> str:
        return self.column


class Sscd(Similarity):
    """Cosine of SSCD descriptors (Pizzi et al. 2022), from the TorchScript file that its authors publish.

    Args:
        path: of that file.
        device: where it computes.
        resize: `small_288` (short side 288 px) or `skew_320` (320 x 320 px), the two that its authors advise.
        min_sscd: only above it can a generation be a copy; 0.5 in Somepalli et al. 2023, 0.7 in Wen et al. 2024.
    """

    name, column, is_distance = "SSCD", "sscd", False

    def __init__(self, path: str, device: torch.device, resize: str = "small_288", min_sscd: float = 0.5):
        self.bound = min_sscd
        if not -1 < self.bound < 1:
            raise ValueError(f"min_sscd must lie between -1 and 1, got {self.bound:g}; 0.5 is usual")
        if resize not in RESIZES:
            raise ValueError(f"sscd_resize must be one of {', '.join(RESIZES)}, got {resize}")
        self.path, self.device, self.resize = path, device, resize
        self.network = load_torchscript("sscd", path, device)
        features = run_torchscript("sscd", path, self.network, torch.zeros(1, 3, 288, 288, device=device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 1:
            raise ValueError(f"sscd={path} does not give (B, D) descriptors; name SSCD's own file")

    @torch.no_grad()
    def features(self, pictures: Pictures) -> Tensor:
        pixels = sscd_pixels(pictures.pixels, self.resize).to(self.device)
        return normalize(self.network(pixels).float(), dim=1).cpu()

    def is_copy(self, values: np.ndarray, cut: float) -> np.ndarray:
        return values > cut

    def compare(self, features: Tensor, others: Tensor) -> Tensor:
        return (features * others).sum(dim=1)

    def compare_all(self, features: Tensor, others: Tensor) -> Tensor:
        return -features @ others.T

    def identity(self) -> str:
        return f"{self.column} {self.resize} {file_hash(self.path)}"


def sscd_pixels(pixels: np.ndarray, resize: str) -> Tensor:
    """(B, height, width, 3) uint8 -> (B, 3, h, w) float32 as SSCD's authors prepare pictures.

    What torchvision's Resize, ToTensor and Normalize make of Pillow images: bilinear, antialiased.
    """
    height, width = pixels.shape[1:3]
    size = (320, 320)
    if resize == "small_288":
        short = min(height, width)
        size = (int(288 * height / short), int(288 * width / short))
    bilinear = Image.Resampling.BILINEAR
    resized = [np.asarray(Image.fromarray(image).resize(size[::-1], bilinear)) for image in pixels]
    values = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(side).reshape(1, 3, 1, 1) for side in (IMAGENET_MEAN, IMAGENET_STD))
    return (values - mean) / std
