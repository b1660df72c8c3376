"""Networks that a user would download, in small, in the files that they come in."""

import warnings
from pathlib import Path

import torch

CPU = torch.device("cpu")


class Descriptor(torch.nn.Module):
    """Stands in for a network: 6 features of a normalised picture, that are no unit vector."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], dim=1) * 3


def scripted(module: torch.nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return str(path)
