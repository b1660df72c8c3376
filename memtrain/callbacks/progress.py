"""The progress bar."""

from __future__ import annotations

import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

_PATIENCE = 0.25  # s between two looks at the numbers


class Progress(RichProgressBar):
    """Shows steps done, and loss, score and excluded share of a recent batch; to Lightning a run is one epoch.

    Who reads them waits for the device, so they are read a few times a second, not at each step.

    Args:
        refresh_rate: batches between two looks.
    """

    def __init__(self, refresh_rate: int):
        super().__init__(refresh_rate)
        self._read: dict = {}
        self._read_at = 0.0

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict:
        if time.monotonic() - self._read_at > _PATIENCE:
            self._read = super().get_metrics(trainer, pl_module)
            self._read.pop("v_num", None)
            self._read_at = time.monotonic()
        return self._read
