"""A run that ends with the weights of its lowest held-out loss."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from memtrain.training.module import DiffusionTraining

log = logging.getLogger(__name__)


class StopEarly(pl.Callback):
    """Keeps the averaged weights of the validation with the lowest held-out loss, which the run then ends with.

    They are what is exported, drawn and measured at the end, whether the run was stopped or reached its last step.
    The validation before the first step counts too: where every later one is worse, the run ends as it began. It comes
    before all callbacks that look at the end, and all ranks see the same losses, so all stop at one step.

    Args:
        patience: the run stops after so many validations in a row that are no better; None: nothing is kept, and the
            run goes on to its last step.
    """

    def __init__(self, patience: int | None):
        if patience is not None and patience < 1:
            raise ValueError(f"stop_early.patience must be >= 1 validation, got {patience}; null stops no run")
        self.patience = patience
        self.loss, self.step, self.waited = math.inf, 0, 0
        self.weights: list[Tensor] | None = None  # on the CPU, in the order of `trained_parameters`

    @property
    def is_over(self) -> bool:
        """Whether enough validations in a row were no better."""
        return self.patience is not None and self.waited >= self.patience

    @torch.no_grad()
    def see(self, trainer: pl.Trainer, pl_module: DiffusionTraining, heldout_loss: float) -> None:
        """Take note of a validation's held-out loss; all ranks call this together, with the same loss."""
        if self.patience is None or pl_module.final_weights is not None:
            return
        if heldout_loss < self.loss:
            self.loss, self.step, self.waited = heldout_loss, trainer.global_step, 0
            self.weights = pl_module.copies_of_averaged_weights()
        else:
            self.waited += 1
        if self.is_over:
            log.info("stopping at step %d: %s", trainer.global_step, self.said())
            trainer.should_stop = True

    def said(self) -> str:
        """Which weights the run ends with, in words."""
        return f"the weights are those of step {self.step}, whose held-out loss was the lowest, {self.loss:.4f}"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_over:  # it was cut off between its last step and its end
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionTraining)
        if self.patience is not None:  # or it was taken back, with resume.allow
            pl_module.final_weights = self.weights

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("loss", "step", "waited", "weights")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
