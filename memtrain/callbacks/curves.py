"""Curves of the live score and of exclusion, by group."""

from __future__ import annotations

import time

import pytorch_lightning as pl
import torch

from memtrain.callbacks.logging import log_metrics
from memtrain.core.exclusion import GROUP_NAMES, Observations
from memtrain.core.statistics import timestep_bin

ALL, HIGH_NOISE = range(2)  # two pools of timesteps
COUNT, SCORED, SCORE, EXCLUDED, LOSS = range(5)


class MemorizationCurves(pl.Callback):
    """Every `every` steps: mean score, excluded share and loss of canaries, training and reference samples.

    Sums live on the device and are reduced over ranks only when they are logged.

    Args:
        every: optimizer steps between two points.
        high_noise: timesteps from this share of the schedule on make the `score_high_noise` curves; that is
            where memorized samples stand out (METHOD.md, the trial).
    """

    def __init__(self, every: int, high_noise: float):
        if every < 1:
            raise ValueError(f"callbacks.curves.every must be >= 1, got {every}")
        self.every, self.high_noise = every, high_noise
        self.total = torch.zeros(5, 2, len(GROUP_NAMES), dtype=torch.float64)  # over the whole run, all ranks
        self.recent: torch.Tensor | None = None
        self.samples_at_log, self.seconds_at_log = 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.recent = torch.zeros(5, 2, len(GROUP_NAMES), dtype=torch.float32, device=pl_module.device)
        self.samples_at_log, self.seconds_at_log = pl_module.samples_seen, time.perf_counter()
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.last_step:
            return  # in the middle of an accumulation window
        self.last_step = trainer.global_step
        self._add(pl_module, pl_module.step_observed, pl_module.step_kept)
        if pl_module.reference_observed is not None:
            self._add(pl_module, pl_module.reference_observed, pl_module.reference_kept)
        if trainer.global_step % self.every == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step % self.every:
            self._log(trainer, pl_module)

    def _add(self, pl_module: pl.LightningModule, observed: Observations, kept: torch.Tensor) -> None:
        noisy = timestep_bin(observed.timesteps, pl_module.num_timesteps, 1000) >= self.high_noise * 1000
        scored = observed.scored.float()
        rows = torch.stack(
            [torch.ones_like(scored), scored, observed.score * scored, (~kept).float(), observed.loss]
        )
        self.recent[:, ALL].index_add_(1, observed.group, rows)
        self.recent[:, HIGH_NOISE].index_add_(1, observed.group, rows * noisy)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sums = self.recent.clone()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        sums = sums.double().cpu()
        self.recent.zero_()
        self.total += sums
        metrics = {"samples_seen": float(pl_module.samples_seen)}
        for number, name in enumerate(GROUP_NAMES):
            count, scored, score, excluded, loss = sums[:, ALL, number].tolist()
            if count:
                metrics |= {f"excluded/{name}": excluded / count, f"loss/{name}": loss / count}
            if scored:
                metrics[f"score/{name}"] = score / scored
            if sums[SCORED, HIGH_NOISE, number]:
                metrics[f"score_high_noise/{name}"] = (
                    sums[SCORE, HIGH_NOISE, number] / sums[SCORED, HIGH_NOISE, number]
                ).item()
        seconds = time.perf_counter()
        metrics["samples_per_second"] = (pl_module.samples_seen - self.samples_at_log) / (seconds - self.seconds_at_log)
        metrics["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics["updates_skipped"] = float(pl_module.updates_skipped)
        self.samples_at_log, self.seconds_at_log = pl_module.samples_seen, seconds
        log_metrics(trainer, metrics)

    def excluded_fraction(self, group: int) -> float:
        """Share of a group's visits over the run at which it was (reference: would have been) excluded."""
        count = self.total[COUNT, ALL, group].item()
        return self.total[EXCLUDED, ALL, group].item() / count if count else float("nan")

    def state_dict(self) -> dict:
        return {"total": self.total}

    def load_state_dict(self, state_dict: dict) -> None:
        self.total = state_dict["total"]
