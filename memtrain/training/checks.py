"""What can be known to fail before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from memtrain.core.exclusion import ExclusionRule

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


def check_checkpoint(ckpt_path: str | None) -> None:
    """Raises ValueError where the checkpoint to resume from is not there."""
    if ckpt_path is not None and not Path(ckpt_path).is_file():
        raise ValueError(f"ckpt_path={ckpt_path}: no such file; name a runs/…/checkpoints/last.ckpt")


def check_reference(exclusion: ExclusionRule, count: int) -> None:
    """Raises ValueError where a rule compares with a reference set and there is none."""
    if exclusion.needs_reference and count == 0:
        raise ValueError(
            f"{type(exclusion).__name__} compares with samples that are never trained on, and reference.count is 0; "
            "set reference.count=200 or so"
        )
