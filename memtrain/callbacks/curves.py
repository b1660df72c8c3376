"""Curves of the live score, of exclusion and of speed."""

from __future__ import annotations

import time
from dataclasses import replace

import pytorch_lightning as pl
from torch import Tensor

from memtrain.callbacks.live_statistics import CAPTIONED, EXCLUDED, LiveStatistics
from memtrain.callbacks.logging import log_histograms, log_metrics, prefixes_of
from memtrain.callbacks.steps import AfterEachStep
from memtrain.core.exclusion import Decision, Observations
from memtrain.training import ranks
from memtrain.training.step_record import DecidedRows

_HELD = 16  # steps whose observations are kept as they are, to be added up in one go


class MemorizationCurves(AfterEachStep):
    """Logs every `every` steps what `LiveStatistics` says of the rows of all ranks since the last point.

    Where a second score is taken, its curves are logged too, as `anchored_score/<group>` and so on.
    It also logs samples/s and `scoring_share`, the share of the time that scoring took: the second forward, and all
    of what is done for the reference set. Both leave out what comes between a point and the next step, validation
    for one; so this is the first of the callbacks.

    Args:
        every: optimizer steps between two points.
        high_noise: timesteps from this share of the schedule on make the `score_high_noise` curves; that is
            where memorized samples stand out (docs/method.md, "What the score shows").
    """

    def __init__(self, every: int, high_noise: float):
        if every < 1:
            raise ValueError(f"callbacks.curves.every must be >= 1, got {every}")
        if not 0 <= high_noise < 1:
            raise ValueError(f"callbacks.curves.high_noise is a share of the schedule in [0, 1), got {high_noise:g}")
        self.every, self.high_noise = every, high_noise
        self.total: Tensor | None = None  # sums over the whole run, all ranks: see LiveStatistics
        self.late: Tensor | None = None  # over its second half
        self.seconds, self.seconds_scoring = 0.0, 0.0  # of the whole run; the latter is the mean of the ranks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.recent = LiveStatistics(pl_module.num_timesteps, self.high_noise, pl_module.device)
        if self.total is None:
            self.total, self.late = (self.recent.sums.cpu().double() for _ in range(2))
        self.prefix = prefixes_of(pl_module.scoring)[-1]  # of the second score's metrics; "" where there is none
        self.second = LiveStatistics(pl_module.num_timesteps, self.high_noise, pl_module.device)
        self.held: list[DecidedRows] = []
        self.step_at_log = trainer.global_step
        self.trainer = trainer
        self.clock_runs = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not self.clock_runs:
            self.clock_runs = True
            pl_module.predictor.scoring_time.take()
            self.samples_at_log, self.began = pl_module.accumulation.samples_seen, time.perf_counter()

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.held += pl_module.last_step.groups
        if len(self.held) >= _HELD:
            self._add()
        if trainer.global_step % self.every == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > self.step_at_log:
            self._log(trainer, pl_module)

    def _add(self) -> None:
        """Add the rows that are held to the recent sums."""
        observed = Observations.concatenate([rows.observed for rows in self.held])
        decision = Decision.concatenate([rows.decision for rows in self.held])
        self.recent.add(observed, decision)
        if self.prefix:
            second = replace(observed, score=observed.second_score, scored=observed.second_score != 0)
            self.second.add(second, decision)
        self.held = []

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up the ranks, log a point of the curves, and begin the next one."""
        if self.held:
            self._add()
        self.recent.flat[-1] = pl_module.predictor.scoring_time.take() / trainer.world_size
        flat = ranks.all_reduce(trainer, self.recent.flat.clone()).cpu().double()
        self.recent.flat.zero_()
        seconds, scoring = time.perf_counter() - self.began, flat[-1].item()
        point = LiveStatistics(pl_module.num_timesteps, self.high_noise, flat=flat)
        self.total += point.sums
        self.late += point.sums * self._is_late(trainer)
        self.seconds, self.seconds_scoring = self.seconds + seconds, self.seconds_scoring + scoring
        optimizer = trainer.optimizers[0].param_groups[0]
        metrics = point.metrics() | {
            "samples_per_second": (pl_module.accumulation.samples_seen - self.samples_at_log) / seconds,
            "scoring_share": scoring / seconds,
            "learning_rate": optimizer["lr"] * optimizer.get("d", 1.0),  # d: what Prodigy has found
            "updates_skipped": float(pl_module.accumulation.updates_skipped),
        }
        histograms = point.score_histograms()
        if self.prefix:
            second = self._take_second(trainer, pl_module)
            metrics |= {f"{self.prefix}{name}": value for name, value in second.score_metrics().items()}
            histograms |= {f"{self.prefix}{name}": value for name, value in second.score_histograms().items()}
        log_metrics(trainer, metrics)
        log_histograms(trainer, histograms)
        self.step_at_log, self.clock_runs = trainer.global_step, False

    def _take_second(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> LiveStatistics:
        """What all ranks' rows showed of the second score since the last point, which begin anew."""
        flat = ranks.all_reduce(trainer, self.second.flat.clone()).cpu().double()
        self.second.flat.zero_()
        return LiveStatistics(pl_module.num_timesteps, self.high_noise, flat=flat)

    def excluded_fraction(self, group: int) -> float:
        """Share of a group's captioned visits at which it was (reference: would have been) excluded."""
        return _share(self.total[:, :, group].sum((1, 2)))

    def excluded_by_timestep(self, group: int) -> list[float]:
        """`excluded_fraction` of each timestep bin, over the run's second half, when rules are warm."""
        # late[:, :, group] is (F, noise, T); summed over noise, (F, T), and a column a bin
        return [_share(sums) for sums in self.late[:, :, group].sum(1).unbind(1)]

    @property
    def scoring_share(self) -> float:
        """Share of the run's time that scoring took."""
        return self.seconds_scoring / self.seconds if self.seconds else float("nan")

    def _is_late(self, trainer: pl.Trainer) -> bool:
        """Whether the point that this step belongs to began in the run's second half, wherever the run goes on from."""
        return (trainer.global_step - 1) // self.every * self.every >= trainer.max_steps / 2

    def _since_the_last_point(self) -> Tensor:
        """The sums of the steps since then, over all ranks, which call this together."""
        recent = LiveStatistics(self.recent.num_timesteps, self.high_noise, flat=self.recent.flat.clone())
        if self.held:
            observed = Observations.concatenate([rows.observed for rows in self.held])
            recent.add(observed, Decision.concatenate([rows.decision for rows in self.held]))
        ranks.all_reduce(self.trainer, recent.flat)
        return recent.sums.cpu().double()

    def state_dict(self) -> dict:
        since = self._since_the_last_point()
        return {
            "total": self.total + since,
            "late": self.late + since * self._is_late(self.trainer),
            "seconds": self.seconds,
            "seconds_scoring": self.seconds_scoring,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.total, self.late = state_dict["total"].clone(), state_dict["late"].clone()
        self.seconds, self.seconds_scoring = state_dict["seconds"], state_dict["seconds_scoring"]


def _share(sums: Tensor) -> float:
    """The excluded share of captioned visits, `nan` where there is none. (F,) -> float"""
    captioned = sums[CAPTIONED].item()
    return sums[EXCLUDED].item() / captioned if captioned else float("nan")
