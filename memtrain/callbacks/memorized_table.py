"""Which samples look memorized: a table with pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from memtrain.callbacks.generation import compare, decode
from memtrain.callbacks.logging import log_picture, log_table
from memtrain.callbacks.steps import AfterEachStep
from memtrain.core.exclusion import GROUP_NAMES, Observations
from memtrain.core.statistics import BinnedMoments, timestep_bin
from memtrain.data.samples import as_text
from memtrain.report.pictures import draw_samples
from memtrain.training import ranks

_HELD = 64  # steps whose observations are added at a time
_BINS, _HALF_LIFE, _WARM = 10, 2000, 20
_CAPACITY = 50_000  # samples that are remembered
COLUMNS = ("image", "caption", "key", "group", "score", "z", "visits", "nearest generation", "RMSE")


class VisitedSamples:
    """Visits and high scores of the pictures seen; of very many, those that stand out least are forgotten.

    Duplicates are one picture. It stands out by the sum of its z-scores over the root of their number (Stouffer
    1949).
    """

    def __init__(self, capacity: int = _CAPACITY):
        self.capacity = capacity
        self.index = np.zeros(0, dtype=np.int64)  # (N,) positions in the corpus, of a picture's first sample, sorted
        self.sums = np.zeros((4, 0))  # (4, N): visits, visits that count, their scores, their z-scores

    def add(self, index: np.ndarray, rows: np.ndarray) -> None:
        """index (B,), rows (4, B): see `sums`."""
        rows = np.concatenate([self.sums, rows], axis=1)
        self.index, place = np.unique(np.concatenate([self.index, index]), return_inverse=True)
        self.sums = np.stack([np.bincount(place, row, minlength=len(self.index)) for row in rows])
        if len(self.index) > 2 * self.capacity:
            kept = np.sort(np.argsort(self.z, kind="stable")[-self.capacity :])
            self.index, self.sums = self.index[kept], self.sums[:, kept]

    @property
    def z(self) -> np.ndarray:
        """(N,)"""
        return self.sums[3] / np.sqrt(np.maximum(self.sums[1], 1))

    @property
    def score(self) -> np.ndarray:
        """Mean score of the visits that count. (N,)"""
        return self.sums[2] / np.maximum(self.sums[1], 1)

    def highest(self, count: int) -> np.ndarray:
        """Rows of the `count` that stand out most, the first one most."""
        order = np.argsort(-self.z, kind="stable")[:count]
        return order[self.sums[1, order] > 0]


class MemorizedTable(AfterEachStep):
    """The trained samples that stand out most, with their nearest generation: W&B table and `memorized.png`.

    A visit counts at high noise, as a z-score of log d against the reference set's in its timestep bin
    (where no reference set is scored: against all trained samples'). All ranks gather what they saw.

    Args:
        every: optimizer steps between two tables; 0 makes one at the end alone.
        samples: rows of the table.
        generations: of each, of which the nearest is shown.
        high_noise: visits at timesteps from this share of the schedule on count.
        num_steps, guidance_scale: of the stock pipeline's DDIM sampler.
        max_rmse: a generation this near is framed as a copy.
        batch_size: generations at a time.
    """

    def __init__(
        self,
        every: int,
        samples: int,
        generations: int,
        high_noise: float,
        num_steps: int,
        guidance_scale: float,
        max_rmse: float,
        batch_size: int,
    ):
        if every < 0:
            raise ValueError(f"callbacks.memorized_table.every must be >= 0, got {every}; 0 is at the end alone")
        for name, value in (("samples", samples), ("generations", generations), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"callbacks.memorized_table.{name} must be >= 1, got {value}")
        self.every, self.samples, self.generations, self.high_noise = every, samples, generations, high_noise
        self.options = (num_steps, guidance_scale, batch_size)
        self.max_rmse = max_rmse
        self.visited, self.moments = VisitedSamples(), BinnedMoments(_BINS, _HALF_LIFE)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.held: list[Observations] = []
        self.held_reference: list[Observations] = []

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        self.held.append(pl_module.step_observed)
        if pl_module.reference_observed is not None:
            self.held_reference.append(pl_module.reference_observed)
        if len(self.held) >= _HELD:
            self._add(trainer, pl_module)
        if self.every and step % self.every == 0 and step != trainer.max_steps:
            self._make(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._make(trainer, pl_module)

    def _add(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add what is held, of all ranks."""
        if not self.held:
            return
        trained = ranks.gather(trainer, Observations.concatenate(self.held), 1)
        against = trained
        if self.held_reference:
            against = ranks.gather(trainer, Observations.concatenate(self.held_reference), 1)
        self.held, self.held_reference = [], []
        score, bins = _log_score(against, pl_module.num_timesteps)
        if pl_module.reference.size(pl_module) == 0 or against is not trained:
            scored = against.scored.cpu()
            self.moments.update(score[scored], bins[scored])
        score, bins = _log_score(trained, pl_module.num_timesteps)
        z = (score - self.moments.mean[bins]) / self.moments.std[bins]
        counts = trained.scored.cpu() & (trained.timesteps.cpu() >= self.high_noise * pl_module.num_timesteps)
        counts &= self.moments.count[bins] >= _WARM
        captioned = trained.captioned.cpu()
        rows = torch.stack([captioned.double(), counts.double(), score.exp() * counts, z * counts])
        self.visited.add(trained.picture.cpu()[captioned].numpy(), rows[:, captioned].numpy())

    @torch.no_grad()
    def _make(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._add(trainer, pl_module)
        highest = self.visited.highest(self.samples)
        samples = pl_module.encode_samples(self.visited.index[highest])
        _, index, captions = samples
        if not captions:
            return  # nothing was scored
        with pl_module.averaged_weights():
            found = compare(trainer, pl_module, samples, self.generations, *self.options, shown=len(captions))
        if not trainer.is_global_zero:
            return
        data, positions = trainer.datamodule, index.tolist()
        originals = data.decode(positions).images.permute(0, 2, 3, 1).numpy()
        nearest = [min((o for o in found if o.sample == n), key=lambda o: o.rmse) for n in range(len(captions))]
        images = decode(pl_module.model, torch.stack([one.latents for one in nearest]))
        table, pictures = [], []
        for n, position in enumerate(positions):
            row = int(np.searchsorted(self.visited.index, position))
            score, z, visits = self.visited.score[row], self.visited.z[row], int(self.visited.sums[0, row])
            group = GROUP_NAMES[data.groups.of(np.array([position]))[0]]
            key = as_text(data.samples.key(position))
            caption, rmse = as_text(captions[n]), nearest[n].rmse
            table.append((originals[n], caption, key, group, score, z, visits, images[n], rmse))
            label = f"{group}, d {score:.2f}, {visits} visits: {caption}"
            pictures.append((label, originals[n], images[n : n + 1], [rmse]))
        log_table(trainer, "memorized_samples", COLUMNS, table)
        path = Path(trainer.default_root_dir) / "memorized.png"
        draw_samples(path, pictures, self.max_rmse)
        log_picture(trainer, "samples_most_memorized", path)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "index": torch.from_numpy(self.visited.index),
            "sums": torch.from_numpy(self.visited.sums),
            "moments": self.moments.sums,
        }

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.visited.index, self.visited.sums = state_dict["index"].numpy(), state_dict["sums"].numpy()
        self.moments.sums = state_dict["moments"].clone()


def _log_score(observed: Observations, num_timesteps: int) -> tuple[Tensor, Tensor]:
    """log d, float64, and timestep bin of B rows, on the CPU."""
    bins = timestep_bin(observed.timesteps.cpu(), num_timesteps, _BINS)
    return observed.score.cpu().clamp(min=1e-12).log().double(), bins
