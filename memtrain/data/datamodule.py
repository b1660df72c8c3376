"""Batches for one rank, from samples and their order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from memtrain.data.batches import Batch, BatchDecoder, CachedBatches, Latents, Samples, Views
from memtrain.data.canaries import Canary
from memtrain.data.find_pictures import find_pictures, read_pictures_from
from memtrain.data.foreign import WithForeign
from memtrain.data.groups import Groups, draw_groups, with_foreign
from memtrain.data.kept import MANY, once_of
from memtrain.data.latents import LatentCache
from memtrain.data.limited import Keep, as_made
from memtrain.data.listed import find_canaries, read_list
from memtrain.data.order import BucketedOrder, EpochOrder, GlobalBatchSampler
from memtrain.data.pictures import NO_DUPLICATES, Pictures
from memtrain.data.remote import ShardMissing
from memtrain.data.samples import ShardSamples

log = logging.getLogger(__name__)

_ENOUGH_ROWS = 200  # before that, a share of bad samples says little


class DataModule(pl.LightningDataModule):
    """Shards, or an endless stream, as micro-batches; canaries planted, the reference set held out.

    Args:
        samples: what is trained on.
        batch_size: rows of a micro-batch on each rank.
        num_workers: decoding processes; 0 decodes in the training process.
        seed: of the order, of the groups and of the views.
        canaries: how many pictures are canaries; with `listed` None or 0 are all of them, and none without.
        repeats: how often an epoch sees each of them, planted, or several such doses that are dealt out in turn;
            None: as often as the corpus holds them, the largest groups of duplicates.
        reference: how many samples are held out.
        weights: how often an epoch sees a sample of each shard; None: once.
        mix_shards: so many shards are open and permuted together.
        crop, flip: see `Views`.
        max_bad_fraction: more than this share of rows that cannot be used stops the run.
        cache: latents and embeddings of the samples, where they were computed before.
        pictures: which samples show the same picture.
        sacrificed: so many of the canaries may not be excluded by any rule.
        named: positions of samples whose pictures are those canaries, in place of a number.
        max_visits_per_group: so often at most an epoch sees a group of duplicates, or a planted canary that is not
            sacrificed; None: no limit.
        listed: canaries that a list names; then none is planted.
        foreign: pictures that are sacrificed in place of the corpus' own, the first `sacrificed` of them.
        foreign_repeats: how often an epoch sees each of these.
        keep: where limited groups of duplicates are kept, see `memtrain.data.limited`.
    """

    trainer: pl.Trainer  # given by Lightning, before it asks for anything

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        num_workers: int,
        seed: int,
        canaries: int | None,
        repeats: int | Sequence[int] | None,
        reference: int,
        weights: Sequence[float] | None = None,
        mix_shards: int = 8,
        crop: str = "center",
        flip: float = 0.0,
        max_bad_fraction: float = 0.05,
        cache: Latents | None = None,
        pictures: Pictures = NO_DUPLICATES,
        sacrificed: int = 0,
        named: Sequence[int] | np.ndarray = (),
        max_visits_per_group: int | None = None,
        listed: Sequence[Canary] = (),
        foreign: Samples | None = None,
        foreign_repeats: int = 75,
        keep: Keep = as_made,
    ):
        super().__init__()
        doses = _doses(repeats)
        for name, value, least in (
            ("data.batch_size", batch_size, 1),
            ("data.num_workers", num_workers, 0),
            ("data.mix_shards", mix_shards, 1),
            ("canaries.count", canaries or 0, 0),
            ("canaries.foreign_repeats", foreign_repeats, 1),
            *(("canaries.repeats", dose, 1) for dose in doses or ()),
            ("reference.count", reference, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is a share in [0, 1], got {max_bad_fraction:g}")
        self.corpus, self.cache, self.batch_size, self.num_workers = samples, cache, batch_size, num_workers
        self.views, self.max_bad_fraction = Views(seed, crop, flip), max_bad_fraction
        self.groups: Groups = draw_groups(
            samples.counts,
            seed,
            canaries or 0,
            reference,
            pictures=pictures,
            repeats=doses,
            sacrificed=sacrificed if foreign is None else 0,
            named=named,
            listed=listed,
        )
        self.samples: Samples = samples  # those of the corpus, and behind them the foreign ones
        if foreign is not None:
            self.samples = WithForeign(samples, foreign, sacrificed)
            self.groups = with_foreign(self.groups, sacrificed, foreign_repeats)
        weights = [1.0] * len(samples.counts) if weights is None else weights
        order = (samples.counts, self.groups, seed, weights, mix_shards)
        if len(samples.sizes) == 1:
            self.order = EpochOrder(*order, max_visits_per_group, keep)
        else:
            assert isinstance(samples, ShardSamples), "only pictures in shards come in buckets"
            self.order = BucketedOrder(*order, samples.buckets, max_visits_per_group, keep)
        self.problems: dict[str, str] = {}  # sample key -> why it could not be used
        self._restored: int | None = None  # rows that were consumed before this run was resumed
        self._first_step = 0

    def check(self, accumulate: int, world_size: int) -> None:
        """Raise before anything is loaded where the corpus is smaller than a global batch."""
        GlobalBatchSampler(self.order, self.batch_size, accumulate, 0, world_size, num_steps=0)

    def check_cache(self, fingerprint: Callable[[], dict[str, str]], text_encoder_is_trained: bool) -> None:
        """Raise where the cached latents are not those that this run would compute."""
        if isinstance(self.cache, LatentCache):
            made_with = {**fingerprint(), **self.cache.samples.described()}
            encoders = [name for name in made_with if name.startswith("text_encoder")]
            unread = (*encoders, "max_sequence_length") if text_encoder_is_trained else ()
            self.cache.check(made_with, ignored=unread)

    def setup(self, stage: str) -> None:
        if self.trainer.is_global_zero:
            for name, why in getattr(self.corpus, "skipped", tuple)():
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
            collate_fn=self.collate(self.views),
            num_workers=self.num_workers,
            pin_memory=trainer.accelerator.auto_device_count() > 0 and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def collate(self, views: Views) -> BatchDecoder | CachedBatches:
        """Makes (step, place, position) rows a Batch: from pictures, or from cached latents where there are any."""
        if self.cache is None:
            return BatchDecoder(self.samples, self.groups, views)
        return CachedBatches(self.cache, self.groups, views)

    def decode(self, positions: Sequence[int] | np.ndarray) -> Batch:
        """The samples at these positions as one batch on the CPU, seen straight; bad ones are reported.

        Raises:
            ShardMissing: a shard is gone.
        """
        rows = [(0, place, int(position)) for place, position in enumerate(positions)]
        batch = BatchDecoder(self.samples, self.groups, views=None)(rows)
        if batch.missing is not None:
            raise ShardMissing(batch.missing)
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
        """How many samples could not be used for each cause, by the indexes and by what was seen since the start."""
        skipped = (why for _, why in getattr(self.corpus, "skipped", tuple)())
        return dict(Counter([*skipped, *self.problems.values()]))


def from_shards(
    shards: str | Mapping | Sequence,
    resolution: int,
    batch_size: int,
    num_workers: int,
    *,
    max_aspect_ratio: float = 1.0,
    bucket_multiple: int = 64,
    caption: str = "txt",
    where: str | None = None,
    cache_dir: str | None = None,
    cache_bytes: int = 100_000_000_000,
    missing_shards: str = "stop",
    cache: str | None = None,
    duplicates: str = "near",
    repeats_from: str | None = None,
    crop: str = "center",
    flip: float = 0.0,
    mix_shards: int = 8,
    max_bad_fraction: float = 0.05,
    exclude_keys: str | None = None,
    max_visits_per_group: int | None = None,
    fetch: str = "shards",
    repeats: int | Sequence[int] | None,
    canaries_file: str | None = None,
    sacrificed_keys: Sequence[str] = (),
    foreign: Samples | None = None,
    **groups: int,
) -> DataModule:
    """Build the DataModule of `data=shards`.

    Args:
        canaries_file: lists the canaries, see `memtrain.data.listed`; None: they are planted, or duplicates.
        sacrificed_keys: of the samples whose pictures are the sacrificed canaries.
        groups: seed, canaries, sacrificed, reference and foreign_repeats of `DataModule`, as `foreign` is.
    """
    listed = read_list(canaries_file) if canaries_file else []
    if listed and repeats is not None and not repeats_from:
        raise ValueError(
            f"canaries.file={canaries_file} lists canaries that the corpus holds, and canaries.repeats={repeats} would "
            "plant others; say canaries.repeats=null"
        )
    if foreign is not None and sacrificed_keys:
        raise ValueError(
            "sacrificed_keys names samples of the corpus, and with foreign pictures none of these is sacrificed; leave "
            "one of the two out"
        )
    if resolution < 1:
        raise ValueError(f"data.resolution must be >= 1, got {resolution}")
    samples = ShardSamples(
        shards,
        resolution,
        caption,
        where,
        cache_dir,
        cache_bytes,
        missing_shards,
        max_aspect_ratio,
        bucket_multiple,
        workers=max(1, num_workers),
        exclude_keys=exclude_keys,
        fetch=fetch,
    )
    samples.log_counts()
    if repeats_from:
        pictures, repeats = read_pictures_from(repeats_from, samples), None
    else:
        pictures = find_pictures(samples, duplicates, workers=max(1, num_workers))
    if len(pictures.positions):
        log.info("%d samples are duplicates, of %d pictures", len(pictures.positions), pictures.count)
    weights = [shard.weight for shard in samples.shards]
    latents = LatentCache(cache, samples, crop, flip > 0) if cache else None
    return DataModule(
        samples,
        batch_size,
        num_workers,
        repeats=repeats,
        weights=weights,
        crop=crop,
        flip=flip,
        mix_shards=mix_shards,
        max_bad_fraction=max_bad_fraction,
        cache=latents,
        pictures=pictures,
        named=samples.find(sacrificed_keys),
        max_visits_per_group=max_visits_per_group,
        listed=find_canaries(listed, samples, canaries_file) if canaries_file else (),
        foreign=foreign,
        keep=partial(once_of, samples.indexed.cache_dir / "limited") if len(pictures.positions) >= MANY else as_made,
        **groups,
    )


def data_of(trainer: pl.Trainer) -> DataModule:
    """The DataModule that a trainer fits with; Lightning sets it where type checkers do not see it."""
    return trainer.datamodule  # type: ignore[attr-defined]


def _doses(repeats: int | Sequence[int] | None) -> list[int] | None:
    """The doses of planted canaries as a list; None: none are planted. Raises ValueError where one is no number."""
    if repeats is None:
        return None
    doses = [repeats] if isinstance(repeats, int) else list(repeats)
    if not doses or not all(type(dose) is int for dose in doses):
        raise ValueError(f"canaries.repeats must be a whole number, several such as [1,20,400], or null, got {repeats}")
    return doses


class _Positions(Dataset[tuple[int, int, int]]):
    """The loader's `dataset`: hands rows on to the decoder."""

    def __getitem__(self, row: tuple[int, int, int]) -> tuple[int, int, int]:
        return row
