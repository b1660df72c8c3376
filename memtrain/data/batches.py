"""Batches: rows of a global batch, decoded from pictures or read from cached latents. Runs in the loader's workers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from memtrain.core.streams import Stream, place_seed
from memtrain.data.groups import Counts, Groups
from memtrain.data.images import BadSample
from memtrain.data.latents import CachedSample
from memtrain.data.remote import ShardMissing
from memtrain.data.view import STRAIGHT, Seen, Sizes, View


class Samples(Protocol):
    """Samples at positions 0..N-1 that can be decoded, such as `ShardSamples`."""

    sizes: list[tuple[int, int]]  # (height, width) of the pictures, px; the usual one first

    @property
    def counts(self) -> Counts:
        """Samples of each shard; a shard's positions follow one another."""

    def key(self, index: int) -> str: ...

    def size_of(self, index: int) -> tuple[int, int]: ...

    def get(self, index: int, view: View, size: tuple[int, int]) -> Seen: ...

    def prefetch(self, numbers: Sequence[int], /) -> None: ...

    def read_ahead(self, indices: Sequence[int], /) -> None:
        """Told which samples `get` is asked for next, so that they can be read at once. Raises ShardMissing."""


class Latents(Protocol):
    """Latents and embeddings of samples at positions 0..N-1, such as a `LatentCache`."""

    @property
    def samples(self) -> Samples: ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each column that a `CachedSample` has."""

    def get(self, index: int, flip: bool) -> CachedSample: ...


@dataclass(frozen=True)
class Views:
    """Which view of a sample a row of a global batch shows: a function of (seed, step, place)."""

    seed: int
    crop: str = "center"  # or random
    flip: float = 0.0  # share of the rows that are mirrored left to right

    def __post_init__(self) -> None:
        if self.crop not in ("center", "random"):
            raise ValueError(f"data.crop must be center or random, got {self.crop}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is a share in [0, 1], got {self.flip:g}")

    def view(self, step: int, place: int) -> View:
        """The view at a place of the global batch of a step."""
        top, left, flip, caption = np.random.default_rng(place_seed(self.seed, Stream.VIEW, step, place)).random(4)
        crop = (top, left) if self.crop == "random" else STRAIGHT.crop
        return View(crop, bool(flip < self.flip), caption)


@dataclass
class Batch:
    """B rows of a global batch. A sample that could not be decoded keeps its row, with `valid` False."""

    images: Tensor  # (B, 3, H, W) uint8; (B, 0) where the batch is cached
    captions: list[str]
    sample_index: Tensor  # (B,) int64, position in the corpus
    picture: Tensor  # (B,) int64, the first position that shows the same picture
    copies: Tensor  # (B,) int64, how many positions do
    group: Tensor  # (B,) int64
    place: Tensor  # (B,) int64, place in the global batch
    valid: Tensor  # (B,) bool
    problems: list[tuple[str, str]]  # (sample key, why) of the rows that are not valid
    posterior: Tensor | None = None  # (B, 2, C, h, w): mean and standard deviation, from the cache
    hidden: Tensor | None = None  # (B, L, D): encoded captions, from the cache
    pooled: Tensor | None = None  # (B, P): the same, of families that have it
    sizes: Tensor | None = None  # (B, 6) float32, `Sizes`; None: a cache for a family that is not told of them
    missing: str | None = None  # a shard that is gone, in words: the batch is not to be trained on
    host: Batch | None = field(default=None, init=False)  # of one that was sent to a device: what it was on the CPU

    @property
    def is_cached(self) -> bool:
        """Whether latents and embeddings came from a cache; then there are no images."""
        return self.posterior is not None

    @property
    def on_host(self) -> Batch:
        """The batch where looking at it is no waiting."""
        return self.host or self

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, for which the host does not wait."""
        wait = torch.device(device).type == "cpu"  # for what comes from a GPU
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=not wait))
        moved.host = self.on_host
        return moved

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return Batch(**values | changed)

    def __len__(self) -> int:
        return len(self.captions)


def _who(groups: Groups, index: np.ndarray) -> dict[str, Tensor]:
    """The fields of a batch that tell who the samples at these positions (B,) are."""
    pictures = groups.pictures
    fields = dict(sample_index=index, picture=pictures.of(index), copies=pictures.copies(index), group=groups.of(index))
    return {name: torch.from_numpy(values.copy()) for name, values in fields.items()}


class BatchDecoder:
    """Collates (step, place, position) rows into a Batch. Runs in the loader's workers.

    Without views all are seen straight, and as squares.
    """

    def __init__(self, samples: Samples, groups: Groups, views: Views | None):
        self.samples, self.groups, self.views = samples, groups, views

    def __call__(self, rows: Sequence[tuple[int, int, int]]) -> Batch:
        size = self.samples.sizes[0] if self.views is None else self.samples.size_of(rows[0][2])
        images = np.zeros((len(rows), 3, *size), dtype=np.uint8)
        sizes = np.tile(np.array(Sizes(*size, 0, 0, *size), dtype=np.float32), (len(rows), 1))  # (B, 6)
        captions, valid, problems = [""] * len(rows), np.zeros(len(rows), dtype=bool), []
        missing = None
        with contextlib.suppress(ShardMissing):  # `get` says so, or passes over its samples
            self.samples.read_ahead([index for _, _, index in rows])
        for row, (step, place, index) in enumerate(rows):
            view = STRAIGHT if self.views is None else self.views.view(step, place)
            try:
                images[row], captions[row], sizes[row] = self.samples.get(index, view, size)
                valid[row] = True
            except BadSample as problem:
                problems.append((self.samples.key(index), str(problem)))
            except ShardMissing as error:  # handed on: the ranks have to end at the same step
                missing = str(error)
                break
        _, place, index = np.array(rows, dtype=np.int64).T  # (B, 3) -> three of (B,)
        return Batch(
            images=torch.from_numpy(images),
            captions=captions,
            **_who(self.groups, index),
            place=torch.from_numpy(place.copy()),
            valid=torch.from_numpy(valid),
            problems=problems,
            sizes=torch.from_numpy(sizes),
            missing=missing,
        )


class CachedBatches:
    """Collates rows into a Batch from cached latents, as `BatchDecoder` does from pictures."""

    def __init__(self, cache: Latents, groups: Groups, views: Views):
        self.cache, self.groups, self.views = cache, groups, views

    def __call__(self, rows: Sequence[tuple[int, int, int]]) -> Batch:
        found: list[CachedSample | None] = [None] * len(rows)
        problems, missing = [], None
        for row, (step, place, index) in enumerate(rows):
            try:
                found[row] = self.cache.get(index, self.views.view(step, place).flip)
            except BadSample as problem:
                problems.append((self.cache.samples.key(index), str(problem)))
            except ValueError as error:  # its file is gone, or another by now; handed on, as above
                missing = str(error)
                break
        # here: a row that could not be read has zeros; stacked, a row a sample
        columns = {
            name: np.stack(
                [np.zeros(shape, np.float32) if sample is None else sample.columns[name] for sample in found]
            )
            for name, shape in self.cache.shapes().items()
        }
        _, place, index = np.array(rows, dtype=np.int64).T  # (B, 3) -> three of (B,)
        return Batch(
            images=torch.zeros(len(rows), 0, dtype=torch.uint8),
            captions=["" if sample is None else sample.caption for sample in found],
            **_who(self.groups, index),
            place=torch.from_numpy(place.copy()),
            valid=torch.tensor([sample is not None for sample in found]),
            problems=problems,
            missing=missing,
            **{name: torch.from_numpy(rows) for name, rows in columns.items()},
        )
