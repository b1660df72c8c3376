"""What ranks tell each other in a step: a few scalars, and for rules that learn the step's observations."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor

from memtrain.core.exclusion import Observations


def all_reduce(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if trainer.world_size > 1:
        torch.distributed.all_reduce(values)
    return values


def gather_texts(trainer: pl.Trainer, text: str) -> list[str]:
    """What each rank says, by rank."""
    if trainer.world_size == 1:
        return [text]
    gathered: list[str] = [""] * trainer.world_size
    torch.distributed.all_gather_object(gathered, text)
    return gathered


def gather(trainer: pl.Trainer, observed: Observations, micro_batches: int) -> Observations:
    """The observations of all ranks, ordered by place in the global batch, by one collective of constant size.

    Args:
        observed: of this rank, as many on each: `micro_batches` parts, one after the other.
    """
    if trainer.world_size == 1:
        return observed
    columns = [getattr(observed, name) for name in observed.__dataclass_fields__]
    packed = torch.stack([column.double() for column in columns])  # float64 holds all exactly
    gathered = [torch.empty_like(packed) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(gathered, packed)
    ordered = torch.stack(gathered, 1).unflatten(2, (micro_batches, -1)).transpose(1, 2).flatten(1)
    return Observations(*(row.to(column.dtype) for row, column in zip(ordered, columns, strict=True)))
