"""How near a generation comes to its training image: SSCD where its file is given, else a named stand-in.

Shapes: B pictures, D features of a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from memtrain.audit.torchscript import IMAGENET_MEAN, IMAGENET_STD, file_hash, load_torchscript, run_torchscript
from memtrain.core.copies import DEFAULT_MAX_RMSE, checked_max_rmse, is_copy, latent_rmse

RESIZES = ("small_288", "skew_320")  # SSCD's own names


@dataclass(frozen=True)
class Pictures:
    """B pictures, generated or read."""

    latents: Tensor  # (B, C, H, W) scaled, float32, on the CPU
    pixels: np.ndarray  # (B, height, width, 3) uint8

    def __len__(self) -> int:
        return len(self.pixels)


class Similarity(ABC):
    """A measure of how much one picture is another. Deterministic, row by row."""

    name: str  # as it is shown
    column: str  # of the rows
    bound: float  # where a generation becomes a copy
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
    def is_copy(self, values: np.ndarray) -> np.ndarray:
        """Whether generations that are so near are copies. (B,) -> (B,) bool"""

    def nearness(self, value: float) -> float:
        """Larger is nearer, to sort by."""
        return -value if self.is_distance else value

    @property
    def rule(self) -> str:
        """What a copy is, in words."""
        return f"{self.name} {'≤' if self.is_distance else '>'} {self.bound:g}"


class LatentRmse(Similarity):
    """The stand-in that needs no weights but the model's: RMSE of scaled latents, see `core.copies`.

    It knows neither shifts nor flips, and models with different VAEs have different scales.
    """

    name, column, is_distance = "RMSE of latents", "latent_rmse", True

    def __init__(self, max_rmse: float = DEFAULT_MAX_RMSE):
        self.bound = checked_max_rmse(max_rmse)

    def is_copy(self, values: np.ndarray) -> np.ndarray:
        return is_copy(values, self.bound)

    def features(self, pictures: Pictures) -> Tensor:
        return pictures.latents

    def compare(self, features: Tensor, others: Tensor) -> Tensor:
        return latent_rmse(features, others)

    def identity(self) -> str:
        return self.column


class Sscd(Similarity):
    """Cosine of SSCD descriptors (Pizzi et al. 2022), from the TorchScript file that its authors publish.

    Args:
        path: of that file.
        device: where it computes.
        resize: `small_288` (short side 288 px) or `skew_320` (320 x 320 px), the two that its authors advise.
        min_sscd: above it a generation is a copy; 0.5 in Somepalli et al. 2023, 0.7 in Wen et al. 2024.
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

    def is_copy(self, values: np.ndarray) -> np.ndarray:
        return values > self.bound

    def compare(self, features: Tensor, others: Tensor) -> Tensor:
        return (features * others).sum(dim=1)

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
