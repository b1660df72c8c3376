"""Batches for one rank, from samples and their order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from memtrain.data.order import EpochOrder, GlobalBatchSampler, Groups, draw_groups
from memtrain.data.samples import BadSample, ShardSamples

log = logging.getLogger(__name__)


class Samples(Protocol):
    """Anything with positions 0..N-1 that can be decoded."""

    resolution: int

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]: ...


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
    """Collates (place, position) pairs into a Batch. Runs in the loader's workers."""

    def __init__(self, samples: Samples, groups: np.ndarray | None):
        self.samples, self.groups = samples, groups

    def __call__(self, rows: Sequence[tuple[int, int]]) -> Batch:
        side = self.samples.resolution
        images = np.zeros((len(rows), 3, side, side), dtype=np.uint8)
        captions, valid, problems = [], np.ones(len(rows), dtype=bool), []
        for row, (_, index) in enumerate(rows):
            try:
                images[row], caption = self.samples[index]
            except BadSample as problem:
                caption, valid[row] = "", False
                problems.append((self.samples.key(index), str(problem)))
            captions.append(caption)
        place, index = np.array(rows, dtype=np.int64).T
        return Batch(
            images=torch.from_numpy(images),
            captions=captions,
            sample_index=torch.from_numpy(index.copy()),
            group=torch.from_numpy(np.zeros_like(index) if self.groups is None else self.groups[index]),
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
        seed: of the order and of the groups.
        canaries, repeats: how many samples are planted, and how often each is seen an epoch.
        reference: how many samples are held out.
    """

    def __init__(
        self, samples: Samples, batch_size: int, num_workers: int, seed: int, canaries: int, repeats: int, reference: int
    ):
        super().__init__()
        for name, value, least in (
            ("data.batch_size", batch_size, 1),
            ("data.num_workers", num_workers, 0),
            ("canaries.count", canaries, 0),
            ("canaries.repeats", repeats, 1),
            ("reference.count", reference, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self.samples, self.batch_size, self.num_workers, self.seed = samples, batch_size, num_workers, seed
        self.groups: Groups = draw_groups(len(samples), seed, canaries, reference)
        self.order = EpochOrder(self.groups, repeats, seed)
        self.problems: dict[str, str] = {}  # sample key -> why it could not be used

    def check(self, accumulate: int, world_size: int) -> None:
        """Raise before anything is loaded where the corpus is smaller than a global batch."""
        GlobalBatchSampler(self.order, self.batch_size, accumulate, 0, world_size, num_steps=0)

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        sampler = GlobalBatchSampler(
            self.order,
            self.batch_size,
            trainer.accumulate_grad_batches,
            trainer.global_rank,
            trainer.world_size,
            num_steps=trainer.max_steps,
            first_step=trainer.global_step,
        )
        return DataLoader(
            _Positions(),
            batch_sampler=sampler,
            collate_fn=BatchDecoder(self.samples, self.groups.of_samples()),
            num_workers=self.num_workers,
            pin_memory=trainer.accelerator.auto_device_count() > 0 and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def decode(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions as one batch on the CPU; bad ones are reported."""
        batch = BatchDecoder(self.samples, self.groups.of_samples())(list(enumerate(map(int, positions))))
        self.report(batch)
        return batch

    def report(self, batch: Batch) -> None:
        """Name each bad sample in the log, once."""
        for key, why in batch.problems:
            if key not in self.problems:
                self.problems[key] = why
                log.warning("bad sample %s: %s", key, why)

    def problems_by_cause(self) -> dict[str, int]:
        skipped = [why for _, why in getattr(self.samples, "skipped", [])]
        return dict(Counter([*skipped, *self.problems.values()]))


def from_shards(
    shards: str | Sequence[str], resolution: int, batch_size: int, num_workers: int, **groups: int
) -> DataModule:
    """`data=shards`. `groups`: seed, canaries, repeats and reference of `DataModule`."""
    if resolution < 1:
        raise ValueError(f"data.resolution must be >= 1, got {resolution}")
    return DataModule(ShardSamples(shards, resolution), batch_size, num_workers, **groups)


class _Positions:
    """The loader's `dataset`: hands (place, position) pairs on to the decoder."""

    def __getitem__(self, row: tuple[int, int]) -> tuple[int, int]:
        return row
