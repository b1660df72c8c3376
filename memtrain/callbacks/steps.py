"""Callbacks that have something to do after an optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod

import pytorch_lightning as pl


class AfterEachStep(pl.Callback, ABC):
    """Calls `after_step` once for each optimizer step, however many micro-batches it has."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step != self._last_step:  # not in the middle of an accumulation window
            self._last_step = trainer.global_step
            self.after_step(trainer, pl_module)

    @abstractmethod
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the model, whose weights are those after `trainer.global_step` steps."""
