"""The reference set in training: samples that are scored, in turn, and never trained on."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from memtrain.core.exclusion import Observations
from memtrain.core.streams import Stream, place_seed
from memtrain.data.batches import Batch
from memtrain.data.datamodule import DataModule, data_of
from memtrain.models.base import DiffusionModel
from memtrain.training.encoded import encode_once, rows_of
from memtrain.training.predictor import Predictor
from memtrain.training.stops import only_finite

log = logging.getLogger(__name__)

_KEYS_NAMED = 8


class ReferenceSet:
    """Samples that are held out: after every k-th step the next ones are scored, as what is trained on is.

    What a turn scores is a function of (seed, step, batch_size), not of ranks: those that have fewer rows fill up
    with rows that are not valid. A turn takes samples of one aspect-ratio bucket.

    Args:
        every: k.
        batch_size: how many, over all ranks; None: half the global batch where the rule needs them, else none.
    """

    def __init__(self, every: int, batch_size: int | None):
        if every < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError(
                f"reference.every and reference.batch_size must be >= 1, got {every} and {batch_size}; "
                "reference.batch_size=null scores none where the rule needs none"
            )
        self.every, self.batch_size = every, batch_size
        self.not_finite = 0  # rows of this rank that were left out
        self.missing: str | None = None  # a shard that was gone for this rank, in words
        self._buckets: list[np.ndarray] = []  # positions; found at the first turn
        self._encoded: dict[int, Batch] = {}  # buckets that look the same at every turn

    def size(self, data: DataModule, is_needed: bool) -> int:
        """How many rows a turn scores, over all ranks; 0: there are none, or nobody asked for them.

        Args:
            is_needed: the exclusion rule compares with them.
        """
        if len(data.groups.reference) == 0:
            return 0
        if self.batch_size is not None:
            return self.batch_size
        return (data.global_batch_size + 1) // 2 if is_needed else 0

    def turn(self, step: int) -> int | None:
        """The number of the turn that comes after this step; None: no sample is scored then."""
        return None if step % self.every else step // self.every

    def observe(
        self, trainer: pl.Trainer, predictor: Predictor, step: int, size: int
    ) -> tuple[Observations, Tensor] | None:
        """Score the samples whose turn it is on this rank, with the weights as they are now; None: nobody's.

        Args:
            step: optimizer steps before this one.
            size: rows of the turn, over all ranks.

        Returns:
            What they show, and which rows are valid, (B,) bool. As many rows on each rank.
        """
        number = self.turn(step)
        if size == 0 or number is None:
            return None
        if not self._buckets:
            self._buckets = by_bucket(data_of(trainer))
        with (
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
            predictor.scoring_time.running(predictor.device),
        ):
            batch = self._batch(trainer, predictor.model, step, number, size).to(predictor.device)
            observed = predictor.visit(batch, step, Stream.REFERENCE_ROW).observed
        finite = observed.finite
        self._report(data_of(trainer), step, observed.sample_index[batch.valid & ~finite].tolist())
        return only_finite(observed), batch.valid & finite

    def _batch(self, trainer: pl.Trainer, model: DiffusionModel, step: int, number: int, size: int) -> Batch:
        """The batch of this rank's B rows of a turn; those past the turn's end are not valid."""
        data = data_of(trainer)
        per_rank = -(-size // trainer.world_size)
        places = np.arange(per_rank) + trainer.global_rank * per_rank  # (B,), in the turn
        bucket, first = self._whose(number, size)
        positions, row = self._buckets[bucket], first + places
        in_turn = places < size
        if len(self._buckets) > 1:  # each sample once a round, however small its bucket
            in_turn &= row < len(positions)
        row %= len(positions)
        if is_seen_alike(data):
            if bucket not in self._encoded:  # once: the VAE is frozen
                self._encoded[bucket] = encode_once(model, data, positions)
            batch = rows_of(self._encoded[bucket], row.tolist(), places.tolist())
        else:
            seed = place_seed(data.views.seed, Stream.REFERENCE_ROW, 0, 0)  # not the trained rows'
            views = replace(data.views, seed=seed)
            rows = zip(places.tolist(), positions[row].tolist(), strict=True)
            batch = data.collate(views)([(step, place, position) for place, position in rows])
            data.report(batch)
        self.missing = self.missing or batch.missing
        return replace(batch, valid=batch.valid & torch.from_numpy(in_turn))

    def _whose(self, number: int, size: int) -> tuple[int, int]:
        """The bucket of a turn, and the first of its rows. A round has as many turns of a bucket as hold it."""
        if len(self._buckets) == 1:
            return 0, number * size
        # the turns of all buckets, each spread evenly over the round; a turn is at the middle of its part
        counts = [-(-len(positions) // size) for positions in self._buckets]
        turns = [((turn + 0.5) / count, b, turn) for b, count in enumerate(counts) for turn in range(count)]
        _, bucket, turn = sorted(turns)[number % len(turns)]
        return bucket, turn * size

    def _report(self, data: DataModule, step: int, positions: list[int]) -> None:
        """Count and name samples whose score or loss is not finite."""
        if not positions:
            return
        self.not_finite += len(positions)
        keys = ", ".join(data.samples.key(position) for position in positions[:_KEYS_NAMED])
        more = f" and {len(positions) - _KEYS_NAMED} more" if positions[_KEYS_NAMED:] else ""
        log.warning(
            "step %d: score or loss of reference samples is not finite: %s%s; they are left out, %d so far",
            step, keys, more, self.not_finite,
        )  # fmt: skip


def say_unscored(count: int) -> None:
    """Says that a reference set of so many samples is not scored, for what is shown of scores lacks it then."""
    if count:
        log.info(
            "the %d reference samples are not scored, since the rule does without; reference.batch_size=16 has "
            "them in the curves and in `memtrain ledger suspects`, at some cost",
            count,
        )


def by_bucket(data: DataModule) -> list[np.ndarray]:
    """The positions of the reference set, (N_b,) of each size of pictures b, the most usual size first."""
    positions = data.groups.reference
    if len(data.samples.sizes) == 1:
        return [positions]
    sizes = [data.samples.size_of(int(position)) for position in positions]
    buckets = [positions[[own == size for own in sizes]] for size in data.samples.sizes]
    return sorted((bucket for bucket in buckets if len(bucket)), key=len, reverse=True)


def is_seen_alike(data: DataModule) -> bool:
    """Whether a picture looks the same at every visit and has one caption, so that encoding it once will do.

    A column may hold several captions of a sample; a latent cache needs no encoding.
    """
    one_caption = getattr(data.corpus, "caption", "txt") == "txt"
    return data.cache is None and data.views.crop == "center" and data.views.flip == 0 and one_caption
