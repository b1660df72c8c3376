"""The progress bar."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Shows steps done, and loss, score and excluded share of the newest batch; to Lightning a run is one epoch.

    Args:
        refresh_rate: batches between two looks.
    """

    def __init__(self, refresh_rate: int):
        super().__init__(refresh_rate)

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
