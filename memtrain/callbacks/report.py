"""The page about a run, written when it ends."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl

from memtrain.callbacks.guard import on_first_rank
from memtrain.report.page import write_report


class Report(pl.Callback):
    """Writes `report.html` from what the run's folder holds, so it comes last, after ledger and summary.

    `memtrain report RUN` writes the same page while the run is going on.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            logger.save()
        self._write(trainer)

    @on_first_rank
    def _write(self, trainer: pl.Trainer) -> None:
        path = Path(trainer.default_root_dir) / "report.html"
        write_report([path.parent], path)
        print(f"{'report':10}{path}")
