"""The rows that a repair trains on: forgotten pictures and kept ones, by the weights as they are and as they were.

Shapes: B rows, C x H x W latents. The cost of a row is counted in forward passes of the network; a backward is two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.repair.material import CaptionedPictures, shared_words
from memtrain.core.diffusion import draw
from memtrain.core.losses import denoising_loss
from memtrain.core.streams import Stream, place_seed
from memtrain.models.anchors import Anchor
from memtrain.models.base import DiffusionModel, trained_parameters
from memtrain.models.conditioning import Conditioning

_DROPPED = 0.2  # share of kept rows with the empty caption, which guidance needs as it was
_EARLIER = 0.25  # share of kept rows that are pictures forgotten before


@dataclass(frozen=True)
class Steps:
    """How a repair trains.

    Args:
        steps: at most so many; the learning rate falls to 0 along a cosine until then.
        lr: of AdamW.
        forgotten_rows, kept_rows: of a step.
        keep_weight: of the kept rows' mean loss, beside that of the forgotten ones.
        near_share: of the kept rows, drawn from that quarter of the kept pictures whose captions share most words with
            forgotten ones: what is forgotten spreads to them first.
        lowest_noise: forgotten pictures are noised at timesteps from this share of the schedule on; below it nothing
            is decided about a picture any more, and what is changed there changes all.
    """

    steps: int = 30
    lr: float = 5e-4
    forgotten_rows: int = 6
    kept_rows: int = 10
    keep_weight: float = 10.0
    near_share: float = 0.5
    lowest_noise: float = 0.3

    def __post_init__(self):
        for name in ("steps", "forgotten_rows", "kept_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr:g}")
        if not self.keep_weight >= 0:
            raise ValueError(f"keep_weight must be >= 0, got {self.keep_weight:g}")
        if not 0 <= self.near_share <= 1:
            raise ValueError(f"near_share is a share in [0, 1], got {self.near_share:g}")
        if not 0 <= self.lowest_noise < 1:
            raise ValueError(f"lowest_noise is a share of the schedule in [0, 1), got {self.lowest_noise:g}")

    def lr_at(self, step: int) -> float:
        """Of a step, from 0: three steps of warm-up, then a cosine to 0."""
        return self.lr * min(1.0, (step + 1) / 3) * (1 + math.cos(math.pi * step / self.steps)) / 2


@dataclass(frozen=True)
class Rows:
    """B rows as one step sees them."""

    pictures: list[int]  # which of the forgotten, or kept, pictures each is of
    latents: Tensor  # (B, C, H, W)
    noise: Tensor
    timesteps: Tensor  # (B,)
    noisy: Tensor
    cond: Conditioning

    def __len__(self) -> int:
        return len(self.pictures)

    def part(self, rows: range) -> Rows:
        """Some consecutive ones of them."""
        some = slice(rows.start, rows.stop)
        tensors = (one[some] for one in (self.latents, self.noise, self.timesteps, self.noisy))
        return Rows(self.pictures[some], *tensors, self.cond.index(list(rows)))


Gradients = list[Tensor | None]  # of each weight; None: it has none


class Work:
    """The model that is repaired, and what for.

    Args:
        model: trains its adapter or its weights; text encoders are frozen.
        anchor: gives it back the weights that it began with.
        forgotten: N pictures that are to go.
        neighbours: of each, a caption that is near to its own and not memorized; None where no method asks.
        kept: K pictures that are to stay.
        earlier: pictures that were forgotten before, which stay forgotten; None: none.
        batches: rows of a step that are predicted at a time; None: all that it has.
    """

    def __init__(
        self,
        model: DiffusionModel,
        anchor: Anchor,
        forgotten: CaptionedPictures,
        kept: CaptionedPictures,
        settings: Steps,
        seed: int = 0,
        neighbours: Sequence[str] | None = None,
        earlier: CaptionedPictures | None = None,
        batches: ShrinkingBatches | None = None,
    ):
        self.model, self.anchor, self.settings, self.seed = model, anchor, settings, seed
        self.batches = batches or ShrinkingBatches(settings.forgotten_rows + settings.kept_rows)
        self.forgotten, self.kept = forgotten, kept if earlier is None else CaptionedPictures.cat([earlier, kept])
        self.num_earlier = 0 if earlier is None else len(earlier)
        shared = np.array(shared_words(kept.captions, forgotten.captions))
        self.near = self.num_earlier + np.argsort(-shared, kind="stable")[: -(-len(kept) // 4)]  # of self.kept
        self.parameters: list[nn.Parameter] = trained_parameters(model)
        self.passes: Counter[str] = Counter()  # forward passes of a row, by what for
        with torch.no_grad():
            self.cond = model.encode_or_null(self.forgotten.captions)
            self.kept_cond = model.encode_or_null(self.kept.captions)
            self.neighbours = None if neighbours is None else model.encode_or_null(list(neighbours))

    # ---- predictions

    def predict(self, rows: Rows, cond: Conditioning | None = None) -> Tensor:
        """(B, C, H, W) with a graph, by the weights as they are, as the network predicts it."""
        self.passes["steps"] += 3 * len(rows)
        return self.model.predict(rows.noisy, rows.timesteps, rows.cond if cond is None else cond).float()

    @torch.no_grad()
    def predict_at_start(self, rows: Rows, cond: Conditioning) -> Tensor:
        """(B, C, H, W) by the weights that the repair began with."""
        self.passes["steps"] += len(rows)
        with self.anchor.in_place(self.model):
            return self.model.predict(rows.noisy, rows.timesteps, cond).float()

    def target(self, rows: Rows) -> Tensor:
        """(B, C, H, W) what training asked the network to predict of these pictures."""
        return self.model.noise_process.target(rows.latents, rows.noise, rows.timesteps)

    def null(self, rows: Rows) -> Conditioning:
        return self.model.null(len(rows))

    # ---- rows

    def forgotten_rows(self, step: int, count: int | None = None) -> Rows:
        """Rows of a step: the pictures take turns."""
        count = count or self.settings.forgotten_rows
        first = step * count
        which = [(first + row) % len(self.forgotten) for row in range(count)]
        return self.noised(self.forgotten.latents, self.cond, which, Stream.FORGOTTEN, step, self.settings.lowest_noise)

    def kept_rows(self, step: int, count: int | None = None, as_training: bool = False) -> Rows:
        """Kept pictures of a step, drawn by seed, some of them with the empty caption; a share is of those that were
        forgotten before, another of those whose captions are like forgotten ones.

        Args:
            as_training: their own pictures are what is to be predicted of them, so that none is one that was forgotten
                before: it would be learnt again.
        """
        count = count or self.settings.kept_rows
        generator = np.random.default_rng(place_seed(self.seed, Stream.REPAIR, step, 0))
        earlier = math.ceil(_EARLIER * count) if self.num_earlier and not as_training else 0
        any_kept = generator.integers(self.num_earlier, len(self.kept), size=count - earlier)
        near = generator.choice(self.near, size=count - earlier)
        is_near = generator.random(count - earlier) < self.settings.near_share
        which = [
            *(generator.integers(self.num_earlier, size=earlier).tolist() if earlier else ()),
            *np.where(is_near, near, any_kept).tolist(),
        ]
        rows = self.noised(self.kept.latents, self.kept_cond, which, Stream.KEPT, step + 1)
        dropped = torch.from_numpy(generator.random(count) < _DROPPED)
        dropped[:earlier] = False
        cond = self.null(rows).where(dropped.to(self.model.device), rows.cond)
        return replace(rows, cond=cond)

    def told_others(self, rows: Rows, share: float, step: int) -> Rows:
        """The same rows, this share of them with the caption of a kept picture, drawn by seed, in place of theirs."""
        generator = np.random.default_rng(place_seed(self.seed, Stream.REPAIR, step, 1))
        other = self.kept_cond.index(generator.integers(self.num_earlier, len(self.kept), size=len(rows)).tolist())
        told = torch.from_numpy(generator.random(len(rows)) < share).to(self.model.device)
        return replace(rows, cond=other.where(told, rows.cond))

    def noised(
        self, latents: Tensor, cond: Conditioning, which: list[int], stream: Stream, step: int, lowest: float = 0.0
    ) -> Rows:
        """These pictures, noised at timesteps from this share of the schedule on; draws depend on (seed, step, row)."""
        process, device = self.model.noise_process, self.model.device
        drawn = draw(self.seed, stream, step, range(len(which)), latents.shape[1:], process).to(device)
        first = int(lowest * process.num_timesteps)
        timesteps = first + drawn.timesteps * (process.num_timesteps - first) // process.num_timesteps
        clean = latents[which].to(device)
        noisy = process.add_noise(clean, drawn.noise, timesteps).to(self.model.network.dtype)
        return Rows(which, clean, drawn.noise, timesteps, noisy, cond.index(which))

    # ---- losses and their gradients, as many rows at a time as fit

    def moved(self, rows: Rows) -> Tensor:
        """(B,) by how much these rows' predictions have moved from those of the weights that the repair began with, a
        mean of squares, with a graph."""
        return denoising_loss(self.predict(rows), self.predict_at_start(rows, rows.cond))

    def descent(
        self, rows: Rows, losses: Callable[[Rows], Sequence[Tensor]], weight: float = 1.0
    ) -> list[tuple[Gradients, float]]:
        """The mean of each loss that `losses` gives of rows, (B,) with a graph, and the gradient of `weight` times it.

        Weights are left as they are: where memory runs out in the middle of some rows, nothing of them is counted.
        """

        def of_part(some: range) -> list[tuple[Gradients, float]]:
            share = len(some) / len(rows)
            with torch.enable_grad():
                means = [loss.mean() for loss in losses(rows.part(some))]
                wanted = [(weight * share) * mean for mean in means]
            gradients = [
                list(torch.autograd.grad(one, self.parameters, retain_graph=one is not wanted[-1], allow_unused=True))
                for one in wanted
            ]
            return [(of, mean.item() * share) for of, mean in zip(gradients, means, strict=True)]

        found, *others = self.batches.over(len(rows), of_part)
        for part in others:
            found = [(combined(of, more), mean + value) for (of, mean), (more, value) in zip(found, part, strict=True)]
        return found

    @torch.no_grad()
    def kept_moved(self, step: int) -> float:
        """How much the kept rows of a step have moved, mean."""
        rows = self.kept_rows(step)
        parts = self.batches.over(len(rows), lambda some: (len(some), self.moved(rows.part(some)).mean().item()))
        return sum(count / len(rows) * mean for count, mean in parts)


def combined(one: Gradients, other: Gradients, scale: float = 1.0) -> Gradients:
    """one + scale other, weight by weight."""
    return [a if b is None else scale * b if a is None else a + scale * b for a, b in zip(one, other, strict=True)]
