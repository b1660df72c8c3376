"""The nearest training picture of each generation."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from memtrain.callbacks.logging import from_all_ranks
from memtrain.core.copies import nearest
from memtrain.core.streams import Stream, place_seed
from memtrain.data.groups import Groups, draw_groups

log = logging.getLogger(__name__)

_AT_ONCE = 256  # pictures whose latents a rank holds


@dataclass(frozen=True)
class Searched:
    """The nearest training picture of each of Q generations."""

    rmse: Tensor  # (Q,) float64, infinity where there is none
    positions: Tensor  # (Q,) int64 of it in the corpus, -1 where there is none
    pictures: int  # that were searched
    of_pictures: int  # that are trained on, duplicates counted


def search(trainer: pl.Trainer, pl_module: pl.LightningModule, generated: list[Tensor], limit: int) -> Searched:
    """Search the training pictures, which the ranks share. All ranks call it together, with the same generations.

    Args:
        generated: latents (C, h, w), Q of them.
        limit: see `training_pictures`.
    """
    groups: Groups = trainer.datamodule.groups
    started, of_pictures = time.perf_counter(), groups.num_samples - len(groups.reference)
    positions = training_pictures(groups, trainer.datamodule.samples.counts, limit, pl_module.seed)
    known = [np.zeros(0, np.int64)]  # here: positions of the latents that this rank has seen, block by block

    def blocks() -> Iterator[Tensor]:
        """This rank's share; every rank takes part in as many blocks."""
        at_once = _AT_ONCE * trainer.world_size
        for first in range(0, len(positions), at_once):
            share = positions[first : first + at_once][trainer.global_rank :: trainer.world_size]
            latents, read = pl_module.encode_pictures(share)
            known.append(read)
            yield latents

    if not generated or len(positions) == 0:
        none = torch.full((len(generated),), -1)
        return Searched(torch.full_like(none, torch.inf, dtype=torch.float64), none, 0, of_pictures)
    rmse, which = nearest(torch.stack(generated), blocks())
    seen = np.concatenate(known)
    mine = torch.from_numpy(np.append(seen, -1)[which.numpy()])  # the last: no picture
    of_ranks = from_all_ranks(trainer, [(rmse, mine, len(seen))])
    least, rank = torch.stack([part[0] for part in of_ranks]).min(dim=0)  # (ranks, Q) -> (Q,)
    found = torch.stack([part[1] for part in of_ranks]).gather(0, rank[None])[0]
    searched = sum(part[2] for part in of_ranks)
    which_ones = "all" if searched == of_pictures else f"{searched} of the {of_pictures}"
    seconds = time.perf_counter() - started
    log.info("%d generations against %s training pictures: %.1f s", len(generated), which_ones, seconds)
    return Searched(least, found, searched, of_pictures)


def training_pictures(groups: Groups, counts, limit: int, seed: int) -> np.ndarray:
    """Positions of all pictures that are trained on; of more than `limit`, so many drawn by seed, and all canaries."""
    if groups.num_samples - len(groups.reference) <= limit:
        return np.setdiff1d(np.arange(groups.num_samples), groups.reference)
    # of few shards where there are many: remote ones are not all fetched for it
    drawn = draw_groups(counts, place_seed(seed, Stream.SEARCHED, 0, 0), limit, 0).canary
    return np.setdiff1d(np.concatenate([drawn, groups.sacrificed, groups.canary]), groups.reference)
