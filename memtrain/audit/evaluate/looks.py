"""What one process does of a model's evaluation: it looks at some samples, or some training pictures, at a time.

Shapes: N training samples, G generations of each, K timesteps; n samples and their n G generations in one look.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.evaluate.pictures import Pictures
from memtrain.audit.evaluate.settings import REFERENCE_GROUP, Measures, Settings
from memtrain.audit.pictures import encode_images
from memtrain.audit.sampling import generate
from memtrain.audit.training_samples import TrainingSamples, read_pictures
from memtrain.core.diffusion import draw
from memtrain.core.streams import Stream
from memtrain.data.images import BadSample
from memtrain.data.samples import ShardSamples
from memtrain.models.conditioning import Conditioning

log = logging.getLogger(__name__)

T = TypeVar("T")

Advance = Callable[[str, int, int], None]  # told after each batch: what, pictures done, of how many
Encode = Callable[[range], Conditioning]  # what the network is told, of these of the n samples


@dataclass(frozen=True)
class OfSamples:
    """A look at these of the N samples: their pictures, losses and generations."""

    rows: range


@dataclass(frozen=True)
class OfPictures:
    """A look at training pictures, in which the nearest to each generation is searched."""

    positions: list[int]


@dataclass(frozen=True)
class OfReal:
    """A look at pictures of the shards, with which the generations are compared as a whole; all can be read."""

    positions: list[int]


Look = OfSamples | OfPictures | OfReal


@dataclass(frozen=True)
class SeenGenerations:
    """What generations of n samples came to, a sample's G after another's.

    `rows`: one a generation; `compared`: what they are compared by; `nearest`: of those nearest to their own picture,
    nearest first, minus the nearness, the place in `rows` and the pixels; `judged`: features, a batch each, of those
    by which quality is judged.
    """

    rows: list[dict]
    compared: Tensor
    nearest: list[tuple[float, int, np.ndarray]]
    judged: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class SeenPictures:
    """What training pictures are compared by, and the positions of those that could be read; None: none could."""

    features: Tensor | None
    positions: list[int]


@dataclass
class Looker:
    """A model at hand, the samples that it is judged on, and how.

    A generation's start depends on (seed, caption, generation) alone, a loss's noise on (seed, sample,
    timestep): models are compared on the same draws, whatever the batch size and whoever looks.
    """

    denoiser: Denoiser
    samples: ShardSamples
    chosen: TrainingSamples
    measures: Measures
    settings: Settings
    batches: ShrinkingBatches
    advance: Advance = lambda what, done, total: None

    def look(self, at: Look) -> list[SeenGenerations] | SeenPictures | Tensor:
        """Of samples their generations and, where there is an attack, those after it."""
        if isinstance(at, OfSamples):
            return self._look_at_samples(at.rows)
        if isinstance(at, OfPictures):
            return self._look_at_pictures(at.positions)
        return self.measures.features(self._pictures(at.positions))

    def _over(self, what: str, first: int, rows: int, total: int, work: Callable[[range], T]) -> Iterator[T]:
        """Batches of `work` on so many rows, with progress: they are `total` in all, `first` of them before these."""
        done = first
        for found in self.batches.over(rows, lambda some: (len(some), work(some))):
            done += found[0]
            self.advance(what, done, total)
            yield found[1]

    def _pictures(self, positions: Sequence[int]) -> Pictures:
        pixels = read_pictures(self.samples, list(positions), self.denoiser.model.own_size)
        return Pictures(encode_images(self.denoiser, pixels, ShrinkingBatches(len(pixels))), pixels)

    def _look_at_samples(self, which: range) -> list[SeenGenerations]:
        positions = self.chosen.positions[which.start : which.stop]

        def work(rows: range) -> tuple[Tensor, Tensor]:
            pictures = self._pictures(positions[rows.start : rows.stop])
            return pictures.latents, self.measures.similarity.features(pictures)

        parts = list(self._over("training images", which.start, len(which), len(self.chosen), work))
        latents, originals = (torch.cat(columns) for columns in zip(*parts, strict=True))  # (n, C, H, W), (n, …)
        captions = self.chosen.captions[which.start : which.stop]
        told = self._generate(which, latents, originals, lambda rows: self.denoiser.encode([captions[n] for n in rows]))
        found = self._attack(which, latents, captions)
        if found is None:
            return [told]
        return [told, self._generate(which, latents, originals, found, attacked=True)]

    def _attack(self, which: range, latents: Tensor, captions: list[str]) -> Encode | None:
        """What the network is told after an attack on the samples' pictures; None where there is none."""

        def advance(done: int, total: int) -> None:
            steps = total // len(which)  # of a sample
            self.advance("attack", which.start * steps + done, len(self.chosen) * steps)

        found = self.settings.attack.search(
            self.denoiser, latents, captions, self.settings.seed, ShrinkingBatches(self.batches.batch_size), advance
        )
        device = self.denoiser.device
        return None if found is None else lambda rows: found.index(list(rows)).map(lambda value: value.to(device))

    @torch.no_grad()
    def _losses(self, which: range, latents: Tensor, encode: Encode, said: str) -> list[float]:
        """Mean squared error of the noise, mean over K fixed timesteps and noises, of each sample (n,).

        In noise whatever the network predicts, so that models are comparable; for noise prediction and the
        reference set's samples, at the same seed, what training logs as `heldout_loss`.
        """
        denoiser, settings = self.denoiser, self.settings
        positions = self.chosen.positions[which.start : which.stop]
        process, k = denoiser.model.noise_process, settings.timesteps_per_sample
        shape = denoiser.latent_shape
        timesteps = ((torch.arange(k) + 0.5) * process.num_timesteps / k).long().tolist()

        def work(rows: range) -> Tensor:
            clean = latents[rows.start : rows.stop].to(denoiser.device)
            cond = encode(rows)
            losses = []
            for number, t in enumerate(timesteps):
                noise = torch.cat(
                    [
                        draw(settings.seed, Stream.HELD_OUT, number, [position], shape, process).noise
                        for position in positions[rows.start : rows.stop]
                    ]
                ).to(denoiser.device)
                steps = torch.full((len(rows),), t, device=denoiser.device)
                noisy = process.add_noise(clean, noise, steps)
                losses.append((denoiser.predict_noise(noisy, t, cond) - noise).square().flatten(1).mean(dim=1))
            return torch.stack(losses, dim=1).mean(dim=1).cpu()

        total = len(self.chosen)
        return torch.cat(list(self._over(f"denoising loss{said}", which.start, len(which), total, work))).tolist()

    def _generate(
        self, which: range, latents: Tensor, originals: Tensor, encode: Encode, attacked: bool = False
    ) -> SeenGenerations:
        """SeenGenerations of these samples, and what they are to their own pictures."""
        said = " under attack" if attacked else ""
        losses = self._losses(which, latents, encode, said)
        settings, similarity, chosen = self.settings, self.measures.similarity, self.chosen
        per_sample = settings.num_images_per_prompt
        wanted = [(n, g) for n in range(len(which)) for g in range(per_sample)]
        captions = chosen.captions[which.start : which.stop]
        seeds = [generation_seeds(text, per_sample, settings.seed) for text in captions]

        def work(rows: range):
            part = wanted[rows.start : rows.stop]
            cond, own = encode([n for n, _ in part]), [seeds[n][g] for n, g in part]
            latents = generate(self.denoiser, cond, own, settings.num_inference_steps, settings.guidance_scale)
            pictures = Pictures(latents.float().cpu(), self.denoiser.model.decode(latents))
            compared = similarity.features(pictures)
            values = similarity.compare(compared, originals[[n for n, _ in part]])
            clip = [None] * len(part)
            if self.measures.alignment is not None:
                clip = self.measures.alignment.scores(pictures.pixels, [captions[n] for n, _ in part]).tolist()
            margin = [None] * len(part)
            if self.measures.margin is not None:
                margin = self.measures.margin.scores(pictures.pixels, [captions[n] for n, _ in part], own).tolist()
            aligned = list(zip(clip, margin, strict=True))
            return part, pictures.pixels, compared, values.tolist(), aligned, self.measures.features(pictures)

        rows: list[dict] = []
        all_compared: list[Tensor] = []
        judged: list[Tensor] = []
        nearest: list[tuple[float, int, np.ndarray]] = []
        has_reference = REFERENCE_GROUP in chosen.groups
        totals = which.start * per_sample, len(wanted), len(chosen) * per_sample
        for part, pixels, compared, values, aligned, features in self._over(f"generations{said}", *totals, work):
            all_compared.append(compared)
            for (n, g), image, value, (clip_score, margin) in zip(part, pixels, values, aligned, strict=True):
                nearest.append((-similarity.nearness(value), len(rows), image))
                rows.append(
                    {
                        "key": chosen.keys[which.start + n],
                        "caption": captions[n],
                        "group": chosen.groups[which.start + n],
                        "generation": g,
                        "attacked": attacked,
                        "seed": seeds[n][g],
                        similarity.column: value,
                        "clip_score": clip_score,
                        "caption_margin": margin,
                        "denoising_loss": losses[n],
                    }
                )
            nearest = nearest_of(nearest, settings.gallery)
            # quality is judged on captions that were never trained on, where there are any
            counted = [not has_reference or chosen.groups[which.start + n] == REFERENCE_GROUP for n, _ in part]
            if any(counted) and not attacked:
                judged.append(features[counted])
        return SeenGenerations(rows, torch.cat(all_compared), nearest, judged)

    def _look_at_pictures(self, positions: list[int]) -> SeenPictures:
        pixels, found = [], []
        for position in positions:
            try:
                pixels.append(self.samples.get(position, size=self.denoiser.model.own_size)[0].transpose(1, 2, 0))
                found.append(position)
            except BadSample as problem:
                log.warning("left out %s: %s", self.samples.key(position), problem)
        if not found:
            return SeenPictures(None, [])
        seen = np.stack(pixels)
        latents = encode_images(self.denoiser, seen, self.batches)
        return SeenPictures(self.measures.similarity.features(Pictures(latents, seen)), found)


def nearest_of(nearest: list[tuple[float, int, np.ndarray]], count: int) -> list[tuple[float, int, np.ndarray]]:
    """The first of these by distance and place; with copies of their pixels, as a view would hold its whole batch."""
    kept = sorted(nearest, key=lambda entry: entry[:2])[:count]
    return [(distance, place, np.array(image)) for distance, place, image in kept]
