"""One way to log a number or a picture to every logger, and to share lists between ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger


def log_metrics(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Write numbers at the current step to all loggers, and remember them in `trainer.callback_metrics`."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def log_picture(trainer: pl.Trainer, name: str, path: Path) -> None:
    """Send a PNG that lies in the run's folder to the loggers that hold pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)])
        elif isinstance(logger, TensorBoardLogger):
            import numpy as np
            from PIL import Image

            pixels = np.asarray(Image.open(path).convert("RGB"))
            logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def wandb_logger(project: str, mode: str, name: str, save_dir: str) -> WandbLogger:
    """A W&B run in the run's folder. `mode`: offline (the default; `wandb sync` sends it later) or online."""
    if mode not in ("offline", "online"):
        raise ValueError(f"logger.wandb.mode must be offline or online, got {mode}; or use logger=csv")
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_SILENT", "true")
    return WandbLogger(project=project, name=name, save_dir=save_dir, offline=mode == "offline")


def share_of_rank(trainer: pl.Trainer, items: list) -> list:
    """Every world_size-th item, from this rank's on."""
    return items[trainer.global_rank :: trainer.world_size]


def from_all_ranks(trainer: pl.Trainer, items: list) -> list:
    """The items of all ranks, rank by rank, on every rank. For a few rows at a time: they are pickled."""
    if trainer.world_size == 1:
        return items
    parts: list = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
