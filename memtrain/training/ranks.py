"""What ranks tell each other in a step: a few scalars, and for rules that learn the step's observations."""

from __future__ import annotations

from dataclasses import fields

import pytorch_lightning as pl
import torch
from torch import Tensor

from memtrain.core.exclusion import Observations


def all_reduce(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """Add values up over all ranks, in place; any shape."""
    if trainer.world_size > 1:
        torch.distributed.all_reduce(values)
    return values


def gather_texts(trainer: pl.Trainer, text: str) -> list[str]:
    """The texts that all ranks give, in the order of the ranks, on every rank."""
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
    packed = pack(observed)
    gathered = [torch.empty_like(packed) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(gathered, packed)
    # R ranks, M micro-batches of B rows; a rank's are (M B, bytes), a micro-batch of the global batch is all ranks' B:
    # (M B, R, bytes) -> (M, B, R, bytes) -> (M, R, B, bytes) -> (M R B, bytes)
    ordered = torch.stack(gathered, 1).unflatten(0, (micro_batches, -1)).transpose(1, 2).flatten(0, 2)
    return unpack(ordered, observed)


def on_host(observed: Observations) -> Observations:
    """Rows on the CPU, by one copy, so that there is one wait for the device and not one a column."""
    return observed if observed.score.device.type == "cpu" else unpack(pack(observed).cpu(), observed)


def pack(observed: Observations) -> Tensor:
    """Turn B rows into their bytes, as they are: float64 would hold all columns too, but not every device has it.

    B rows -> (B, bytes) uint8, for `unpack`
    """
    columns = [getattr(observed, field.name) for field in fields(Observations)]
    return torch.cat([column.contiguous()[:, None].view(torch.uint8) for column in columns], dim=1)


def unpack(packed: Tensor, like: Observations) -> Observations:
    """Turn the bytes of `pack` into rows again, in the dtypes of `like`. (N, bytes) uint8 -> N rows"""
    dtypes = [getattr(like, field.name).dtype for field in fields(Observations)]
    parts = packed.split([dtype.itemsize for dtype in dtypes], dim=1)
    return Observations(
        *(
            part.clone(memory_format=torch.contiguous_format).view(dtype)[:, 0]  # a view needs bytes that are aligned
            for part, dtype in zip(parts, dtypes, strict=True)
        )
    )
