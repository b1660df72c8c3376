"""Fréchet distance (Heusel et al. 2017) and kernel distance (Binkowski et al. 2018) between generations and the
shards' pictures, on features of choice.

InceptionV3's weights are a download, so FID proper needs them as a file; without one the model's own latents
are compared, and the figure has another name.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torchmetrics.image.fid import FrechetInceptionDistance

from memtrain.audit.evaluate.pictures import Pictures
from memtrain.audit.torchscript import file_hash, load_torchscript, run_torchscript
from memtrain.core.statistics import kernel_distance

GRID = 4  # cells a side


class Features(Protocol):
    name: str  # of the distance

    def __call__(self, pictures: Pictures) -> Tensor:
        """(B, D) float32 on the CPU."""

    def identity(self) -> str:
        """Tells features of another make apart."""


class LatentGrid:
    """Mean and standard deviation of each latent channel in 4 x 4 cells: layout, colour, and how much detail.

    Compares models that share a VAE, and nothing else.
    """

    name = "Fréchet distance of VAE latents"

    def __call__(self, pictures: Pictures) -> Tensor:
        mean = adaptive_avg_pool2d(pictures.latents, GRID)
        square = adaptive_avg_pool2d(pictures.latents.square(), GRID)
        return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt()], dim=1).flatten(1)

    def identity(self) -> str:
        return f"latents {GRID}"


class ScriptFeatures:
    """Features of a TorchScript file that takes (B, 3, height, width) uint8, on any size, and gives (B, D).

    One with an argument `return_features`, as the InceptionV3 of StyleGAN's authors, is asked for them.
    """

    def __init__(self, path: str, device: torch.device):
        self.path, self.device = path, device
        self.name = f"FID ({path.rstrip('/').rsplit('/', 1)[-1]})"
        self.network = load_torchscript("fid", path, device)
        asked = any(argument.name == "return_features" for argument in self.network.forward.schema.arguments)
        self.options = {"return_features": True} if asked else {}
        trial = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)
        found = run_torchscript("fid", path, self.network, trial, **self.options)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1:
            raise ValueError(f"fid={path} does not give (B, D) features of (B, 3, height, width) uint8")

    @torch.no_grad()
    def __call__(self, pictures: Pictures) -> Tensor:
        pixels = torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2).to(self.device)
        return self.network(pixels, **self.options).float().cpu()

    def identity(self) -> str:
        return f"fid {file_hash(self.path)}"


class Distances:
    """Of features that were computed before: torchmetrics' Fréchet distance, and the kernel distance, KID.

    The kernel distance is unbiased: models that are judged on few pictures can be told apart by it, too.
    """

    def __init__(self) -> None:
        self.features: dict[bool, list[Tensor]] = {True: [], False: []}  # of real and generated pictures

    def add(self, features: Tensor, real: bool) -> None:
        """features (B, D)"""
        self.features[real].append(features)

    @property
    def counts(self) -> dict[bool, int]:
        """Pictures on either side."""
        return {real: sum(map(len, parts)) for real, parts in self.features.items()}

    def frechet(self) -> float | None:
        """None where either side has fewer than two pictures."""
        if min(self.counts.values()) < 2:
            return None
        given = nn.Identity()
        given.num_features = self.features[True][0].shape[1]
        metric = FrechetInceptionDistance(feature=given)
        for real, parts in self.features.items():
            for features in parts:
                metric.update(features, real=real)
        return metric.compute().item()

    def kernel(self) -> float | None:
        """None where either side has fewer than two pictures."""
        if min(self.counts.values()) < 2:
            return None
        return kernel_distance(torch.cat(self.features[True]), torch.cat(self.features[False]))
