"""Which samples look memorized: a table with pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from memtrain.callbacks.copies import cut_of
from memtrain.callbacks.generation import Compared, compare
from memtrain.callbacks.guard import on_first_rank
from memtrain.callbacks.logging import log_picture, log_table
from memtrain.callbacks.steps import AfterEachStep
from memtrain.core.copies import checked_max_rmse
from memtrain.core.exclusion import GROUP_NAMES, Observations
from memtrain.core.statistics import BinnedMoments, timestep_bin
from memtrain.core.visits import COUNTED_FROM, SUMS, columns_of, evidence, log_ratio
from memtrain.data.escaping import as_text
from memtrain.report.pictures import draw_samples, samples_of_picture
from memtrain.training import ranks

_HELD = 64  # steps whose observations are added at a time
_BINS, _HALF_LIFE, _WARM = 10, 2000, 20
_CAPACITY = 50_000  # pictures that are remembered
COLUMNS = ("image", "caption", "key", "samples", "group", "score", "evidence", "visits", "nearest generation", "RMSE")


class VisitedSamples:
    """Sums over the visits of each picture that was seen; duplicates are one, which their first sample names."""

    def __init__(self):
        self.index = np.zeros(0, dtype=np.int64)  # (N,) positions in the corpus, of a picture's first sample, sorted
        self.sums = np.zeros((2 + SUMS, 0))  # (2 + SUMS, N): visits, scores of those that count, see core.visits

    def add(self, index: np.ndarray, rows: np.ndarray) -> None:
        """Add what V visits showed. index (V,) and rows (2 + SUMS, V): as `index` and `sums` are."""
        rows = np.concatenate([self.sums, rows], axis=1)
        # pictures that were seen before and now again become one column each, in the order of their index
        self.index, place = np.unique(np.concatenate([self.index, index]), return_inverse=True)
        self.sums = np.stack([np.bincount(place, row, minlength=len(self.index)) for row in rows])

    def evidence(self, reference: VisitedSamples | None) -> np.ndarray:
        """The evidence against each picture, see `core.visits`. (N,)

        Args:
            reference: visits that chance is estimated on; None: it is on these themselves.
        """
        both = [self.sums] if reference is None else [self.sums, reference.sums]
        sums = torch.from_numpy(np.concatenate(both, axis=1)[2:])
        compared = torch.arange(sums.shape[1]) >= (0 if reference is None else len(self.index))
        return evidence(sums, compared & (sums[0] > 0)).numpy()[: len(self.index)]

    def forget(self, evidence: np.ndarray, capacity: int) -> None:
        """Forget those that stand out least, once there are twice as many as `capacity`."""
        if len(self.index) > 2 * capacity:
            kept = np.sort(np.argsort(evidence, kind="stable")[-capacity:])
            self.index, self.sums = self.index[kept], self.sums[:, kept]

    @property
    def score(self) -> np.ndarray:
        """Mean score of the visits that count. (N,)"""
        return self.sums[1] / np.maximum(self.sums[2], 1)

    def highest(self, evidence: np.ndarray, count: int) -> np.ndarray:
        """Which `count` pictures, or fewer, stand out most, the first one most. (N,) -> (count,) columns of `sums`"""
        order = np.argsort(-evidence, kind="stable")[:count]
        return order[self.sums[2, order] > 0]


class MemorizedTable(AfterEachStep):
    """Shows the trained pictures that stand out most beside their nearest generation: W&B table, `memorized.png`.

    They are ranked by the evidence of `core.visits`, as `memtrain ledger` and the report rank them after the run.
    A visit counts as a z-score against what the reference set showed of late in its timestep bin
    (where no reference set is scored: all trained pictures). All ranks gather what they saw.

    Args:
        every: optimizer steps between two tables; 0 makes one at the end alone.
        samples: rows of the table.
        num_images_per_prompt: of each, of which the nearest is shown.
        counted_from: visits at timesteps from this share of the schedule on count; None is as the score wants it.
        num_inference_steps, guidance_scale: of the stock pipeline's sampler.
        max_rmse: a generation this near is framed as a copy; at the end one within the cut that `Copies` set.
        batch_size: generations at a time.
    """

    def __init__(
        self,
        every: int,
        samples: int,
        num_images_per_prompt: int,
        counted_from: float | None,
        num_inference_steps: int,
        guidance_scale: float,
        max_rmse: float,
        batch_size: int,
    ):
        if every < 0:
            raise ValueError(f"callbacks.memorized_table.every must be >= 0, got {every}; 0 is at the end alone")
        for name, value in (
            ("samples", samples),
            ("num_images_per_prompt", num_images_per_prompt),
            ("num_inference_steps", num_inference_steps),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"callbacks.memorized_table.{name} must be >= 1, got {value}")
        self.every, self.samples, self.counted_from = every, samples, counted_from
        self.num_images_per_prompt = num_images_per_prompt
        self.options = (num_inference_steps, guidance_scale, batch_size)
        self.max_rmse = checked_max_rmse(max_rmse, "callbacks.memorized_table.max_rmse")
        self.visited, self.reference = VisitedSamples(), VisitedSamples()
        self.moments = BinnedMoments(_BINS, _HALF_LIFE)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.trainer, self.module = trainer, pl_module
        self.held: list[tuple[int, Observations]] = []  # (step, what it showed)
        self.held_reference: list[tuple[int, Observations]] = []

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        record = pl_module.last_step
        self.held.append((step, record.trained.observed))
        if record.reference is not None:
            self.held_reference.append((step, record.reference.observed))
        if len(self.held) >= _HELD:
            self._add(trainer, pl_module)
        if self.every and step % self.every == 0 and step != trainer.max_steps:
            self._make(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._make(trainer, pl_module)

    def _add(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the visits that are held, of all ranks, to the sums of their pictures."""
        if not self.held:
            return
        trained = self._gather(trainer, self.held)
        against = self._gather(trainer, self.held_reference) if self.held_reference else None
        self.held, self.held_reference = [], []
        has_reference = pl_module.reference_size > 0
        learned = against if has_reference else trained
        if learned is not None:
            _, observed = learned
            scored, bins = observed.scored.cpu(), self._bins(observed, pl_module)
            self.moments.update(log_ratio(observed.score, observed.loss)[scored], bins[scored])
        self._count(self.visited, *trained, pl_module)
        if against is not None:
            self._count(self.reference, *against, pl_module)
        if len(self.visited.index) > 2 * _CAPACITY:
            self.visited.forget(self._evidence(pl_module), _CAPACITY)

    def _gather(self, trainer: pl.Trainer, held: list[tuple[int, Observations]]) -> tuple[Tensor, Observations]:
        """The V visits of all ranks, one rank after the other, and when in the run each was: (V,) in (0, 1]."""
        time = torch.cat([torch.full((len(observed.score),), step / trainer.max_steps) for step, observed in held])
        observed = ranks.gather(trainer, Observations.concatenate([observed for _, observed in held]), 1)
        return time.double().repeat(trainer.world_size), observed

    def _bins(self, observed: Observations, pl_module: pl.LightningModule) -> Tensor:
        return timestep_bin(observed.timesteps.cpu(), pl_module.num_timesteps, _BINS)

    def _count(self, visited: VisitedSamples, time: Tensor, observed: Observations, pl_module) -> None:
        """Add V visits to the sums of their pictures; those that count, with what they showed."""
        bins = self._bins(observed, pl_module)
        z = (log_ratio(observed.score, observed.loss) - self.moments.mean[bins]) / self.moments.std[bins]
        counted_from = COUNTED_FROM[pl_module.scoring.rule] if self.counted_from is None else self.counted_from
        counts = observed.scored.cpu() & (observed.timesteps.cpu() >= counted_from * pl_module.num_timesteps)
        counts &= self.moments.count[bins] >= _WARM
        captioned, score = observed.captioned.cpu(), observed.score.cpu().double()
        # (1 + SUMS, V), 0 where a visit does not count; then (2 + SUMS, V) with a row of ones, for all that are visits
        shown = torch.where(counts, torch.cat([score[None], columns_of(z, time)]), 0.0)
        rows = torch.cat([captioned.double()[None], shown])
        visited.add(observed.picture.cpu()[captioned].numpy(), rows[:, captioned].numpy())

    def _evidence(self, pl_module: pl.LightningModule) -> np.ndarray:
        """The evidence against each picture visited. (N,)"""
        has_reference = pl_module.reference_size > 0
        return self.visited.evidence(self.reference if has_reference else None)

    @torch.no_grad()
    def _make(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rank the pictures, generate from the captions of the first ones, and show them."""
        self._add(trainer, pl_module)
        strength = self._evidence(pl_module)
        samples = pl_module.encode_samples(self.visited.index[self.visited.highest(strength, self.samples)])
        captions = samples.captions
        if not captions:
            return  # nothing was scored
        with pl_module.averaged_weights():
            wanted = [(n, g) for n in range(len(captions)) for g in range(self.num_images_per_prompt)]
            found = compare(trainer, pl_module, samples, wanted, *self.options, with_latents=True)
        self._show(trainer, pl_module, samples, found, strength)

    @on_first_rank
    def _show(self, trainer, pl_module, samples, found: list[Compared], strength: np.ndarray) -> None:
        index, captions = samples.positions, samples.captions
        data, positions = trainer.datamodule, index.cpu().numpy()
        originals = data.decode(positions).images.permute(0, 2, 3, 1).numpy()
        nearest = [min((o for o in found if o.sample == n), key=lambda o: o.rmse) for n in range(len(captions))]
        images = pl_module.model.decode(torch.stack([one.latents for one in nearest]))
        groups, sizes = data.groups.of(positions), data.groups.pictures.copies(positions)
        table, pictures = [], []
        for n, row in enumerate(np.searchsorted(self.visited.index, positions)):
            score, visits, size = self.visited.score[row], int(self.visited.sums[0, row]), int(sizes[n])
            group, key = GROUP_NAMES[groups[n]], as_text(data.samples.key(int(positions[n])))
            caption, rmse = as_text(captions[n]), nearest[n].rmse
            table.append((originals[n], caption, key, size, group, score, strength[row], visits, images[n], rmse))
            said = [group, samples_of_picture(size), f"score {score:.2f}", f"{visits} visits"]
            label = f"{', '.join(filter(None, said))}: {caption}"
            pictures.append((label, originals[n], images[n : n + 1], [rmse]))
        log_table(trainer, "memorized_samples", COLUMNS, table)
        path = Path(trainer.default_root_dir) / "memorized.png"
        draw_samples(path, pictures, cut_of(trainer, self.max_rmse))
        log_picture(trainer, "samples_most_memorized", path)

    def state_dict(self) -> dict[str, Tensor]:
        self._add(self.trainer, self.module)  # all ranks call this together
        both = {"": self.visited, "reference_": self.reference}
        arrays = {f"{name}index": torch.from_numpy(of.index) for name, of in both.items()}
        arrays |= {f"{name}sums": torch.from_numpy(of.sums) for name, of in both.items()}
        return arrays | {"moments": self.moments.sums}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        for name, of in (("", self.visited), ("reference_", self.reference)):
            of.index, of.sums = state_dict[f"{name}index"].numpy(), state_dict[f"{name}sums"].numpy()
        self.moments.sums = state_dict["moments"].clone()
