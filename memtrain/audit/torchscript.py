"""Networks in TorchScript files, of SSCD and of feature extractors: loaded, tried, told apart."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor

from memtrain.data.paths import TORCHSCRIPT, check_file

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what pictures are normalized by


def load_torchscript(key: str, path: str, device: torch.device) -> torch.jit.ScriptModule:
    """Raises ValueError in one line where there is no such file, or another thing in it."""
    file = check_file(key, path, TORCHSCRIPT)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.load.* is deprecated", DeprecationWarning)
            return torch.jit.load(str(file), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{key}={path} is no TorchScript file; a checkpoint of weights alone will not do") from error


def run_torchscript(key: str, path: str, network: torch.jit.ScriptModule, pixels: Tensor, **options):
    """What it makes of a trial. Raises ValueError in one line where it takes something else."""
    try:
        with torch.no_grad():
            return network(pixels, **options)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{key}={path} cannot be run on a batch of pictures: {reason}") from error


def file_hash(path: str) -> str:
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
