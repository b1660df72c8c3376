"""Image-space baselines: memorized prompts give pictures that lie close together."""

from __future__ import annotations

import hashlib
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from memtrain.audit.torchscript import IMAGENET_MEAN, IMAGENET_STD
from memtrain.data.paths import TORCHSCRIPT, check_file


def tiled_distance(images: Tensor, tiles: int = 4) -> Tensor:
    """Largest of the l2 distances of tiles, per pixel value, of each pair (Carlini et al. 2023, section 4.2).

    A plain l2 distance calls two dark pictures near; the worst of tiles x tiles tiles does not.

    Args:
        images: (n, C, H, W) in [0, 1].

    Returns:
        (n (n - 1) / 2,) in [0, 1].
    """
    height, width = (side // tiles * tiles for side in images.shape[-2:])  # what does not fill a tile is cut
    cut = (
        images[..., :height, :width]
        .unfold(-2, height // tiles, height // tiles)
        .unfold(-2, width // tiles, width // tiles)
    )
    cut = cut.flatten(2, 3).transpose(1, 2).flatten(2)  # (n, tiles * tiles, values)
    pairs = [(cut[a] - cut[b]).square().mean(dim=1).sqrt().max() for a, b in combinations(range(len(cut)), 2)]
    return torch.stack(pairs)


class TiledL2Density:
    """Minus the mean tiled l2 distance between a prompt's generations."""

    name = "tiled_l2"

    def __repr__(self) -> str:
        return "TiledL2Density()"

    def of_prompt(self, images: np.ndarray) -> float:
        """(n, H, W, 3) uint8, n >= 2."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return -tiled_distance(pixels).mean().item()


class EmbeddingDensity:
    """Mean cosine similarity between the embeddings of a prompt's generations.

    Args:
        network: (n, 3, side, side) float32, ImageNet mean and std -> (n, D); SSCD at side 288.
        side: in px, of the square that pictures are resized to.
    """

    name = "embedding"

    def __init__(self, network: nn.Module, side: int = 288):
        self.network, self.side = network, side

    def __repr__(self) -> str:
        """Names the weights too: scores that were kept tell by it what they were made with."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        return f"EmbeddingDensity(side={self.side}, weights={digest.hexdigest()[:16]})"

    @staticmethod
    def load(path: str | Path, device: torch.device) -> EmbeddingDensity:
        """A TorchScript file. Raises ValueError where it cannot be read."""
        file = check_file("embedding", path, TORCHSCRIPT)
        try:
            return EmbeddingDensity(torch.jit.load(str(file), map_location=device).eval())
        except RuntimeError as error:
            raise ValueError(f"embedding={path} is no TorchScript file; save it with torch.jit.save") from error

    @torch.no_grad()
    def of_prompt(self, images: np.ndarray) -> float:
        """(n, H, W, 3) uint8, n >= 2."""
        device = next((tensor.device for tensor in self.network.parameters()), torch.device("cpu"))
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(device) / 255
        size = (self.side, self.side)
        pixels = nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (pixels.new_tensor(values).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        units = nn.functional.normalize(self.network((pixels - mean) / std), dim=1)
        pairs = torch.combinations(torch.arange(len(units)))
        return (units[pairs[:, 0]] * units[pairs[:, 1]]).sum(dim=1).mean().item()
