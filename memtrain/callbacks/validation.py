"""Held-out loss, and the scores of fixed samples at fixed noise and timesteps."""

from __future__ import annotations

import logging
import math

import pytorch_lightning as pl
import torch
from torch import Tensor

from memtrain.callbacks.logging import from_all_ranks, log_metrics, prefixes_of, share_of_rank
from memtrain.callbacks.steps import AfterEachStep
from memtrain.core.exclusion import CANARY, GROUP_NAMES, REFERENCE, SACRIFICED, TRAINED
from memtrain.core.statistics import auc, tpr_at_fpr
from memtrain.core.streams import Stream
from memtrain.training.encoded import EncodedSamples
from memtrain.training.stop_early import StopEarly

log = logging.getLogger(__name__)


class Validation(AfterEachStep):
    """Measures at fixed noise what the averaged weights do to each group: before, every `every` steps, at the end.

    Each sample is noised to `timesteps_per_sample` timesteps, evenly spread over the schedule; noise depends on
    (seed, sample, timestep) alone, so two runs of one seed are compared on the same draws.

    Logs `heldout_loss` (reference set, never trained on), `val_score/<group>`, `val_score_high_noise/<group>`,
    and how well the mean score at high noise tells canaries from the reference set (`auc`, `tpr_at_1pct_fpr`). Of a
    second score the same, as `anchored_val_score/<group>`.

    Args:
        every: optimizer steps between two validations.
        samples: at most so many of each group.
        timesteps_per_sample: timesteps at which each is looked at.
        high_noise: timesteps from this share of the schedule on count as high noise.
        batch_size: rows of a forward pass.
    """

    def __init__(self, every: int, samples: int, timesteps_per_sample: int, high_noise: float, batch_size: int):
        for name, value in (
            ("every", every),
            ("samples", samples),
            ("timesteps_per_sample", timesteps_per_sample),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"callbacks.validation.{name} must be >= 1, got {value}")
        if not 0 <= high_noise < 1:
            raise ValueError(
                f"callbacks.validation.high_noise is a share of the schedule in [0, 1), got {high_noise:g}"
            )
        if (timesteps_per_sample - 0.5) / timesteps_per_sample < high_noise:
            enough = math.ceil(0.5 / (1 - high_noise) - 1e-9)
            raise ValueError(
                f"callbacks.validation.timesteps_per_sample={timesteps_per_sample} looks at none at high noise, from "
                f"{high_noise:g} of the schedule on; say {enough} or more, or a lower high_noise"
            )
        self.every, self.samples, self.timesteps_per_sample = every, samples, timesteps_per_sample
        self.high_noise, self.batch_size = high_noise, batch_size
        self.validated_at = -1
        self._groups: list[tuple[int, EncodedSamples]] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self._validate(trainer, pl_module)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step % self.every == 0:
            self._validate(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self.validated_at or pl_module.final_weights is not None:
            self._validate(trainer, pl_module)

    def _load(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Encode the samples that are looked at, some of each group, evenly spread."""
        groups = trainer.datamodule.groups
        self._groups = []
        for number, positions in (
            (TRAINED, groups.some_trained(self.samples)),
            (CANARY, groups.one_each(groups.canary)),
            (SACRIFICED, groups.one_each(groups.sacrificed)),
            (REFERENCE, groups.reference),
        ):
            spread = positions[:: max(1, len(positions) // self.samples)][: self.samples]
            self._groups.append((number, pl_module.encode_samples(spread)))

    @torch.no_grad()
    def _validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated_at = trainer.global_step
        if self._groups is None:
            self._load(trainer, pl_module)
        metrics, by_sample, prefixes = {}, {}, prefixes_of(pl_module.scoring)
        with pl_module.averaged_weights(), trainer.precision_plugin.forward_context():
            for number, samples in self._groups:
                if len(samples.captions) == 0:
                    continue
                timesteps, loss, *scores = self._look_at(trainer, pl_module, samples)
                noisy = timesteps >= self.high_noise * pl_module.num_timesteps
                name = GROUP_NAMES[number]
                metrics[f"val_loss/{name}"] = loss.mean().item()
                for prefix, values in zip(prefixes, scores, strict=False):  # of a single score the second is 0
                    metrics[f"{prefix}val_score/{name}"] = values.mean().item()
                    metrics[f"{prefix}val_score_high_noise/{name}"] = values[:, noisy].mean().item()
                    by_sample[prefix, number] = values[:, noisy].mean(dim=1)
        if f"val_loss/{GROUP_NAMES[REFERENCE]}" in metrics:
            metrics["heldout_loss"] = metrics.pop(f"val_loss/{GROUP_NAMES[REFERENCE]}")
        for prefix in prefixes:
            if (prefix, REFERENCE) in by_sample and (prefix, CANARY) in by_sample:
                both = by_sample[prefix, CANARY], by_sample[prefix, REFERENCE]
                canaries, reference = (scores[scores.isfinite()] for scores in both)
                metrics[f"{prefix}auc_canary_vs_reference"] = auc(canaries, reference)
                metrics[f"{prefix}tpr_at_1pct_fpr"] = tpr_at_fpr(canaries, reference)
        log_metrics(trainer, metrics)
        for callback in trainer.callbacks:
            if isinstance(callback, StopEarly) and "heldout_loss" in metrics:
                callback.see(trainer, pl_module, metrics["heldout_loss"])
        if trainer.is_global_zero:
            shown = ("heldout_loss", "auc_canary_vs_reference")
            said = ", ".join(f"{name} {metrics[name]:.4f}" for name in shown if name in metrics)
            log.info("step %d of %d: %s", trainer.global_step, trainer.max_steps, said)

    def _look_at(self, trainer, pl_module, encoded: EncodedSamples) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predict and score N samples at K timesteps, the work shared by the ranks.

        Returns:
            Timesteps (K,), loss, score and second score (N, K) each, on the CPU, on every rank.
        """
        predictor, k = pl_module.predictor, self.timesteps_per_sample
        latents, index, captions, sizes = encoded
        timesteps = ((torch.arange(k) + 0.5) * predictor.num_timesteps / k).long()
        rows = share_of_rank(trainer, [(n, i) for n in range(len(captions)) for i in range(k)])
        results = []
        for first in range(0, len(rows), self.batch_size):
            part = rows[first : first + self.batch_size]
            # (B, C, h, w): of each row from (seed, sample, timestep) alone
            draws = [predictor.draw(Stream.HELD_OUT, i, [int(index[n])], latents.shape[1:]) for n, i in part]
            samples = [n for n, _ in part]
            told = predictor.encode([captions[n] for n in samples], predictor.model.encode)
            found = predictor.predict_and_score(
                latents[samples].to(predictor.device),
                torch.cat([draw.noise for draw in draws]).to(predictor.device),
                timesteps[[i for _, i in part]].to(predictor.device),
                told.map(lambda conditioning, sizes=sizes[samples]: conditioning.sized(sizes)),
            )
            results += zip(part, *(v.tolist() for v in (found.loss, found.score, found.second_score)), strict=True)
        values = torch.zeros(3, len(captions), k)  # loss, score and second score, (3, N, K)
        for (n, i), *row in from_all_ranks(trainer, results):
            values[:, n, i] = torch.tensor(row)
        return timesteps, values[0], values[1], values[2]
