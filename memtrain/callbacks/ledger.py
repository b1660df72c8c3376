"""Writes the ledger: what happened to every sample at every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl

from memtrain.core.exclusion import Decision, Observations
from memtrain.data.ledger import About, LedgerRows, LedgerWriter, begin, drawn
from memtrain.data.paths import LEDGER
from memtrain.training.step_record import DecidedRows

_HELD = 64  # steps whose rows stay on the device, so that training need not wait for them


class Ledger(pl.Callback):
    """Writes each rank's rows into `ledger/`, where they are on disk whenever a checkpoint is made.

    A row is written where the rule could decide: for rules that need scores, of captioned samples with a
    score, taken now or remembered; for others, of captioned samples. Comes before what reads the ledger.

    Args:
        sample: share of the rows that is written, drawn by (seed, step, sample).
        seed: of that draw.
    """

    def __init__(self, sample: float, seed: int):
        if not 0 < sample <= 1:
            raise ValueError(f"ledger.sample is a share in (0, 1], got {sample:g}; use ledger=off to keep no ledger")
        self.sample, self.seed = sample, seed
        self.folder: Path | None = None
        self.resumed_from: str | None = None  # the ledger of the run that made the checkpoint
        self.writer: LedgerWriter | None = None
        self.held: list[tuple[int, DecidedRows]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder = Path(trainer.default_root_dir).absolute() / LEDGER
        if trainer.is_global_zero:
            begin(self.folder, trainer.global_step, self._earlier(trainer))
        trainer.strategy.barrier("ledger")
        scoring = pl_module.scoring
        about = About(pl_module.num_timesteps, self.sample, scoring.rule, scoring.second)
        self.writer = LedgerWriter(self.folder, trainer.global_rank, trainer.datamodule.samples.key, about)
        self.held, self.last_step = [], trainer.global_step

    def _earlier(self, trainer: pl.Trainer) -> list[Path]:
        """The folders in which the ledger that this run goes on with may lie: its own, or one beside the checkpoint."""
        if self.resumed_from is None:
            return []
        return [Path(self.resumed_from), Path(trainer.ckpt_path).absolute().parents[1] / LEDGER]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._take(trainer, pl_module)

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hold the rows of the last optimizer step, once."""
        if trainer.global_step == self.last_step:
            return  # in the middle of an accumulation window
        self.last_step = trainer.global_step
        record = pl_module.last_step
        self.held += [(record.step, rows) for rows in record.groups]
        if len(self.held) >= _HELD:
            self._hand_over(pl_module)

    def _hand_over(self, pl_module: pl.LightningModule) -> None:
        """Give the rows that are held to the writer."""
        if not self.held:
            return
        steps, decided = zip(*self.held, strict=True)
        self.held = []
        seen = Observations.concatenate([rows.observed for rows in decided])
        decision = Decision.concatenate([rows.decision for rows in decided])
        rows = LedgerRows(
            step=np.repeat(np.array(steps, dtype=np.int64), [len(rows.decision.keep_mask) for rows in decided]),
            sample_index=seen.sample_index.cpu().numpy(),
            picture=seen.picture.cpu().numpy(),
            group=seen.group.cpu().numpy().astype(np.int8),
            timestep=seen.timesteps.cpu().numpy().astype(np.int16),
            score=seen.score.cpu().numpy(),
            scored=seen.scored.cpu().numpy(),
            loss=seen.loss.cpu().numpy(),
            threshold=decision.threshold.cpu().numpy(),
            kept=decision.keep_mask.cpu().numpy(),
            second_score=seen.second_score.cpu().numpy(),
        )
        decidable = (seen.known if pl_module.exclusion.needs_score else seen.captioned).cpu().numpy()
        self.writer.add(rows.where(decidable & drawn(self.seed, rows.step, rows.sample_index, self.sample)))

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have all rows up to the last optimizer step on disk."""
        self._take(trainer, pl_module)
        self._hand_over(pl_module)
        self.writer.close_part()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Have every rank's rows on disk before the checkpoint is. Where a run breaks off, nobody waits."""
        if self.writer is None:
            return  # before the first step
        self._write(trainer, pl_module)
        if not trainer.interrupted:
            trainer.strategy.barrier("ledger")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)
        trainer.strategy.barrier("ledger")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.writer is not None:
            self._write(trainer, pl_module)

    def state_dict(self) -> dict[str, str | None]:
        return {"ledger": None if self.folder is None else str(self.folder)}

    def load_state_dict(self, state_dict: dict[str, str | None]) -> None:
        self.resumed_from = state_dict["ledger"]
