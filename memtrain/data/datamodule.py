"""Batches for one rank, from samples and their order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from memtrain.core.diffusion import place_seed
from memtrain.data.images import BadSample
from memtrain.data.order import EpochOrder, GlobalBatchSampler, Groups, draw_groups
from memtrain.data.samples import STRAIGHT, ShardSamples, View

log = logging.getLogger(__name__)

_VIEW = 32  # stream of randomness, apart from those of core.diffusion and data.order
_ENOUGH_ROWS = 200  # before that, a share of bad samples says little


class Samples(Protocol):
    """Anything with positions 0..N-1 that can be decoded."""

    resolution: int
    counts: Sequence[int]  # samples of each shard; a shard's positions follow one another

    def key(self, index: int) -> str: ...

    def get(self, index: int, view: View) -> tuple[np.ndarray, str]: ...

    def prefetch(self, shards: Sequence[int]) -> None: ...


@dataclass(frozen=True)
class Views:
    """Which view of a sample a row of a global batch shows: a function of (seed, step, place)."""

    seed: int
    crop: str = "center"  # or random
    flip: float = 0.0  # share of the rows that are mirrored left to right

    def __post_init__(self):
        if self.crop not in ("center", "random"):
            raise ValueError(f"data.crop must be center or random, got {self.crop}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is a share in [0, 1], got {self.flip:g}")

    def view(self, step: int, place: int) -> View:
        top, left, flip, caption = np.random.default_rng(place_seed(self.seed, _VIEW, step, place)).random(4)
        crop = (top, left) if self.crop == "random" else STRAIGHT.crop
        return View(crop, flip < self.flip, caption)


@dataclass
class Batch:
    """B rows of a global batch. A sample that could not be decoded keeps its row, with `valid` False."""

    images: Tensor  # (B, 3, R, R) uint8
    captions: list[str]
    sample_index: Tensor  # (B,) int64, position in the corpus
    group: Tensor  # (B,) int64
    place: Tensor  # (B,) int64, place in the global batch
    valid: Tensor  # (B,) bool
    problems: list[tuple[str, str]]  # (sample key, why) of the rows that are not valid

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def _map(self, change) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def __len__(self) -> int:
        return len(self.captions)


class BatchDecoder:
    """Collates (step, place, position) rows into a Batch. Runs in the loader's workers."""

    def __init__(self, samples: Samples, groups: Groups, views: Views | None):
        self.samples, self.groups, self.views = samples, groups, views

    def __call__(self, rows: Sequence[tuple[int, int, int]]) -> Batch:
        side = self.samples.resolution
        images = np.zeros((len(rows), 3, side, side), dtype=np.uint8)
        captions, valid, problems = [], np.ones(len(rows), dtype=bool), []
        for row, (step, place, index) in enumerate(rows):
            view = STRAIGHT if self.views is None else self.views.view(step, place)
            try:
                images[row], caption = self.samples.get(index, view)
            except BadSample as problem:
                caption, valid[row] = "", False
                problems.append((self.samples.key(index), str(problem)))
            captions.append(caption)
        _, place, index = np.array(rows, dtype=np.int64).T
        return Batch(
            images=torch.from_numpy(images),
            captions=captions,
            sample_index=torch.from_numpy(index.copy()),
            group=torch.from_numpy(self.groups.of(index)),
            place=torch.from_numpy(place.copy()),
            valid=torch.from_numpy(valid),
            problems=problems,
        )


class DataModule(pl.LightningDataModule):
    """Shards, or an endless stream, as micro-batches; canaries planted, the reference set held out.

    Args:
        samples: what is trained on.
        batch_size: rows of a micro-batch on each rank.
        num_workers: decoding processes; 0 decodes in the training process.
        seed: of the order, of the groups and of the views.
        canaries, repeats: how many samples are planted, and how often each is seen an epoch.
        reference: how many samples are held out.
        weights: how often an epoch sees a sample of each shard; None: once.
        mix_shards: so many shards are open and permuted together.
        crop, flip: see `Views`.
        max_bad_fraction: more than this share of rows that cannot be used stops the run.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        num_workers: int,
        seed: int,
        canaries: int,
        repeats: int,
        reference: int,
        weights: Sequence[float] | None = None,
        mix_shards: int = 8,
        crop: str = "center",
        flip: float = 0.0,
        max_bad_fraction: float = 0.05,
    ):
        super().__init__()
        for name, value, least in (
            ("data.batch_size", batch_size, 1),
            ("data.num_workers", num_workers, 0),
            ("data.mix_shards", mix_shards, 1),
            ("canaries.count", canaries, 0),
            ("canaries.repeats", repeats, 1),
            ("reference.count", reference, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is a share in [0, 1], got {max_bad_fraction:g}")
        self.samples, self.batch_size, self.num_workers = samples, batch_size, num_workers
        self.views, self.max_bad_fraction = Views(seed, crop, flip), max_bad_fraction
        self.groups: Groups = draw_groups(samples.counts, seed, canaries, reference)
        self.order = EpochOrder(samples.counts, self.groups, repeats, seed, weights, mix_shards)
        self.problems: dict[str, str] = {}  # sample key -> why it could not be used
        self._restored: int | None = None  # rows that were consumed before this run was resumed
        self._first_step = 0

    def check(self, accumulate: int, world_size: int) -> None:
        """Raise before anything is loaded where the corpus is smaller than a global batch."""
        GlobalBatchSampler(self.order, self.batch_size, accumulate, 0, world_size, num_steps=0)

    def setup(self, stage: str) -> None:
        if self.trainer.is_global_zero:
            for name, why in getattr(self.samples, "skipped", tuple)():
                log.warning("skipped %s: %s", name, why)

    # ---- position: the number of global rows consumed, the same on every rank

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def consumed(self) -> int:
        """Rows of the endless order that the finished optimizer steps have consumed."""
        return (self._restored or 0) + (self.trainer.global_step - self._first_step) * self.global_batch_size

    def state_dict(self) -> dict[str, int]:
        return {"samples_consumed": self.consumed()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._restored = state["samples_consumed"]

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        self._first_step = trainer.global_step
        sampler = GlobalBatchSampler(
            self.order,
            self.batch_size,
            trainer.accumulate_grad_batches,
            trainer.global_rank,
            trainer.world_size,
            num_steps=trainer.max_steps,
            first_step=self._first_step,
            consumed=self._restored or 0,
            upcoming=self.samples.prefetch,
        )
        return DataLoader(
            _Positions(),
            batch_sampler=sampler,
            collate_fn=BatchDecoder(self.samples, self.groups, self.views),
            num_workers=self.num_workers,
            pin_memory=trainer.accelerator.auto_device_count() > 0 and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def decode(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions as one batch on the CPU, seen straight; bad ones are reported."""
        rows = [(0, place, int(position)) for place, position in enumerate(positions)]
        batch = BatchDecoder(self.samples, self.groups, views=None)(rows)
        self.report(batch)
        return batch

    def report(self, batch: Batch) -> None:
        """Name each bad sample in the log, once."""
        for key, why in batch.problems:
            if key not in self.problems:
                self.problems[key] = why
                log.warning("bad sample %s: %s", key, why)

    def check_bad(self, bad: int, seen: int) -> None:
        """Raise where more than `max_bad_fraction` of the rows seen, on all ranks, could not be used."""
        if seen >= _ENOUGH_ROWS and bad > self.max_bad_fraction * seen:
            causes = ", ".join(f"{number} {why}" for why, number in Counter(self.problems.values()).most_common(3))
            raise ValueError(
                f"{bad} of {seen} samples could not be used, more than data.max_bad_fraction="
                f"{self.max_bad_fraction:g} allows ({causes}); see `memtrain shards check`, or raise it"
            )

    def problems_by_cause(self) -> dict[str, int]:
        skipped = (why for _, why in getattr(self.samples, "skipped", tuple)())
        return dict(Counter([*skipped, *self.problems.values()]))


def from_shards(
    shards: str | Mapping | Sequence,
    resolution: int,
    batch_size: int,
    num_workers: int,
    *,
    caption: str = "txt",
    where: str | None = None,
    cache_dir: str | None = None,
    cache_bytes: int = 100_000_000_000,
    missing_shards: str = "stop",
    **rest: int | float | str,
) -> DataModule:
    """`data=shards`. `rest`: what `DataModule` takes."""
    if resolution < 1:
        raise ValueError(f"data.resolution must be >= 1, got {resolution}")
    samples = ShardSamples(
        shards, resolution, caption, where, cache_dir, cache_bytes, missing_shards, workers=max(1, num_workers)
    )
    weights = [shard.weight for shard in samples.shards]
    return DataModule(samples, batch_size, num_workers, weights=weights, **rest)


class _Positions:
    """The loader's `dataset`: hands rows on to the decoder."""

    def __getitem__(self, row: tuple[int, int, int]) -> tuple[int, int, int]:
        return row
