"""What can be known to fail before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from pytorch_lightning import Trainer
from torch import nn

from memtrain.core.exclusion import ExclusionRule
from memtrain.data.paths import CHECKPOINT, check_file
from memtrain.training.resume import whole_checkpoint

# float32 weights, two Adam moments and the average: 16 bytes; the newest checkpoint and the one it replaces
CHECKPOINT_BYTES_PER_PARAMETER = 2 * 16
EXPORT_BYTES_PER_PARAMETER = 8
LOGS_BYTES = 50_000_000


def check_disk(run_dir: Path, parameters: Iterable[nn.Parameter]) -> None:
    """Raises OSError where the disk has no room for the checkpoints, the export and the logs of a run."""
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    count = sum(parameter.numel() for parameter in parameters)
    needed = count * (CHECKPOINT_BYTES_PER_PARAMETER + EXPORT_BYTES_PER_PARAMETER) + LOGS_BYTES
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"the disk is too full for a run: {existing} has {free / 1e6:.0f} MB free, checkpoints, export and "
            f"logs need about {needed / 1e6:.0f} MB; free some space or set runs_dir="
        )


def check_checkpoint(ckpt_path: str | None) -> Path | None:
    """The checkpoint to begin from, or an older one beside it where it is damaged. Raises ValueError: there is none."""
    if ckpt_path is None:
        return None
    return whole_checkpoint(check_file("ckpt_path", ckpt_path, CHECKPOINT))


def check_accelerator(accelerator: str, devices: object) -> None:
    """Raises ValueError where GPUs are asked for that are not there."""
    if accelerator not in ("gpu", "cuda"):
        return
    there = torch.cuda.device_count()
    if there == 0 and not (accelerator == "gpu" and torch.backends.mps.is_available()):
        raise ValueError(
            f"trainer.accelerator={accelerator}: torch {torch.__version__} finds no GPU here (nvidia-smi shows those "
            "of the machine, CUDA_VISIBLE_DEVICES hides some); use trainer=cpu"
        )
    asked = devices if isinstance(devices, int) else 0
    if there and asked > there:
        raise ValueError(f"trainer.devices={asked}: this machine has {there}; -1 takes all")


def check_reference(exclusion: ExclusionRule, count: int) -> None:
    """Raises ValueError where a rule compares with a reference set and there is none."""
    if exclusion.needs_reference and count == 0:
        raise ValueError(
            f"{type(exclusion).__name__} compares with samples that are never trained on, and reference.count is 0; "
            "set reference.count=200 or so"
        )


def check_job(trainer: Trainer, is_job: bool) -> None:
    """Raises ValueError where a job of -m has several ranks that Lightning would start: as the whole command, all jobs
    again."""
    if not is_job or trainer.world_size == 1:
        return
    if not trainer.strategy.cluster_environment.creates_processes_externally:
        raise ValueError(
            f"train -m starts jobs of one rank, got {trainer.world_size}; say trainer.devices=1, or use "
            "memtrain sweep, whose trials are programs of their own"
        )
