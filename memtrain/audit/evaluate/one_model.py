"""One finished model on chosen training samples: what it copies, and what it can still do.

Shapes: N training samples, G generations of each, K timesteps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.evaluate.fid import Distances
from memtrain.audit.evaluate.judging import judge, note_nearest, summarise
from memtrain.audit.evaluate.results import REFERENCE_GROUP, Found, Match, Measures, ModelResult, Settings
from memtrain.audit.evaluate.similarity import Pictures
from memtrain.audit.pictures import encode_images
from memtrain.audit.sampling import generate
from memtrain.audit.training_pictures import TrainingPictures
from memtrain.audit.training_samples import TrainingSamples, draw_positions, read_pictures
from memtrain.core.diffusion import draw
from memtrain.core.streams import Stream, place_seed
from memtrain.data.images import BadSample
from memtrain.data.samples import ShardSamples
from memtrain.models.conditioning import Conditioning

log = logging.getLogger(__name__)

T = TypeVar("T")

Advance = Callable[[str, int, int], None]  # told after each batch: what, pictures done, of how many
Encode = Callable[[Sequence[int]], Conditioning]  # what the network is told, of these of the N samples


class Evaluation:
    """One model, the samples it is judged on, and how.

    A generation's start depends on (seed, caption, generation) alone, a loss's noise on (seed, sample,
    timestep): models are compared on the same draws, whatever the batch size.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        samples: ShardSamples,
        chosen: TrainingSamples,
        measures: Measures,
        settings: Settings,
        batches: ShrinkingBatches,
        advance: Advance,
    ):
        self.denoiser, self.samples, self.chosen = denoiser, samples, chosen
        self.measures, self.settings = measures, settings
        self.batches, self.advance = batches, advance
        self.size = denoiser.model.own_size
        self.pictures = TrainingPictures(
            samples, chosen.never_trained_on(), settings.nearest, chosen.positions, settings.seed
        )
        self.distances = Distances()

    def run(self, name: str, source: str, identity: str) -> Found:
        latents, originals = self._look_at_originals()
        rows, features, nearest = self._generate(latents, originals, self._told_of_captions)
        if (found := self._attack(latents)) is not None:
            attacked, features_attacked, near = self._generate(latents, originals, found, attacked=True)
            nearest += [(len(rows) + number, image) for number, image in near]
            rows, features = rows + attacked, torch.cat([features, features_attacked])
        searched = self._search(rows, features)
        never_seen = [row["group"] == REFERENCE_GROUP and not row["attacked"] for row in rows]
        cut = judge(rows, never_seen, self.measures.similarity, self.settings.false_copies)
        self._look_at_real_pictures()
        similarity = self.measures.similarity
        per_sample = self.settings.num_images_per_prompt
        groups = [summarise(rows, group, per_sample, similarity) for group in dict.fromkeys(self.chosen.groups)]
        result = ModelResult(
            model=name,
            source=source,
            measure=similarity.name,
            copy_rule=similarity.rule(similarity.in_own_terms(cut.distance)),
            cut=similarity.in_own_terms(cut.distance),
            cut_is=cut.why,
            searched=searched,
            groups=groups,
            heldout_loss=next((g.denoising_loss for g in groups if g.group == REFERENCE_GROUP), None),
            frechet_name=self.measures.features.name,
            frechet_distance=self.distances.frechet(),
            kernel_distance=self.distances.kernel(),
            frechet_generated=self.distances.counts[False],
            frechet_real=self.distances.counts[True],
            identity=identity,
            attack=str(self.settings.attack),
        )
        return Found(result, pa.Table.from_pylist(rows), self._pairs(rows, nearest))

    def _over(self, what: str, total: int, work: Callable[[range], T]) -> Iterator[T]:
        """Batches of `work`, with progress."""
        done = 0
        for found in self.batches.over(total, lambda rows: (len(rows), work(rows))):
            done += found[0]
            self.advance(what, done, total)
            yield found[1]

    def _pictures(self, positions: list[int]) -> Pictures:
        pixels = read_pictures(self.samples, positions, self.size)
        return Pictures(encode_images(self.denoiser, pixels, ShrinkingBatches(len(pixels))), pixels)

    def _look_at_originals(self) -> tuple[Tensor, Tensor]:
        """Latents (N, C, H, W) and features (N, …) of the training images."""

        def work(rows: range) -> tuple[Tensor, Tensor]:
            pictures = self._pictures(self.chosen.positions[rows.start : rows.stop])
            return pictures.latents, self.measures.similarity.features(pictures)

        parts = list(self._over("training images", len(self.chosen), work))
        return torch.cat([latents for latents, _ in parts]), torch.cat([features for _, features in parts])

    def _told_of_captions(self, numbers: Sequence[int]) -> Conditioning:
        return self.denoiser.encode([self.chosen.captions[n] for n in numbers])

    def _attack(self, latents: Tensor) -> Encode | None:
        """What the network is told after an attack on the samples' pictures; None where there is none."""
        found = self.settings.attack.search(
            self.denoiser, latents, self.chosen.captions, self.settings.seed,
            ShrinkingBatches(self.batches.batch_size), lambda done, total: self.advance("attack", done, total),
        )  # fmt: skip
        device = self.denoiser.device
        return None if found is None else lambda rows: found.index(list(rows)).map(lambda value: value.to(device))

    @torch.no_grad()
    def _losses(self, latents: Tensor, encode: Encode, said: str) -> list[float]:
        """Mean squared error of the noise, mean over K fixed timesteps and noises, of each sample (N,).

        In noise whatever the network predicts, so that models are comparable; for noise prediction and the
        reference set's samples, at the same seed, what training logs as `heldout_loss`.
        """
        denoiser, settings, chosen = self.denoiser, self.settings, self.chosen
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
                        for position in chosen.positions[rows.start : rows.stop]
                    ]
                ).to(denoiser.device)
                steps = torch.full((len(rows),), t, device=denoiser.device)
                noisy = process.add_noise(clean, noise, steps)
                losses.append((denoiser.predict_noise(noisy, t, cond) - noise).square().flatten(1).mean(dim=1))
            return torch.stack(losses, dim=1).mean(dim=1).cpu()

        return torch.cat(list(self._over(f"denoising loss{said}", len(chosen), work))).tolist()

    def _generate(
        self, latents: Tensor, originals: Tensor, encode: Encode, attacked: bool = False
    ) -> tuple[list[dict], Tensor, list[tuple[int, np.ndarray]]]:
        """A row a generation, what they are compared by (Q, …), and (row, pixels) of those nearest to their own."""
        said = " under attack" if attacked else ""
        losses = self._losses(latents, encode, said)
        settings, chosen, similarity = self.settings, self.chosen, self.measures.similarity
        wanted = [(n, g) for n in range(len(chosen)) for g in range(settings.num_images_per_prompt)]
        seeds = [generation_seeds(text, settings.num_images_per_prompt, settings.seed) for text in chosen.captions]

        def work(rows: range):
            part = wanted[rows.start : rows.stop]
            captions = [chosen.captions[n] for n, _ in part]
            cond, own = encode([n for n, _ in part]), [seeds[n][g] for n, g in part]
            latents = generate(self.denoiser, cond, own, settings.num_inference_steps, settings.guidance_scale)
            pictures = Pictures(latents.float().cpu(), self.denoiser.model.decode(latents))
            compared = similarity.features(pictures)
            values = similarity.compare(compared, originals[[n for n, _ in part]])
            clip = [None] * len(part)
            if self.measures.alignment is not None:
                clip = self.measures.alignment.scores(pictures.pixels, captions).tolist()
            return part, pictures.pixels, compared, values.tolist(), clip, self.measures.features(pictures)

        rows: list[dict] = []
        all_compared: list[Tensor] = []
        nearest: list[tuple[float, int, np.ndarray]] = []
        has_reference = REFERENCE_GROUP in chosen.groups
        for part, pixels, compared, values, clip, features in self._over(f"generations{said}", len(wanted), work):
            all_compared.append(compared)
            for (n, g), image, value, score in zip(part, pixels, values, clip, strict=True):
                nearest.append((-similarity.nearness(value), len(rows), image))
                rows.append(
                    {
                        "key": chosen.keys[n],
                        "caption": chosen.captions[n],
                        "group": chosen.groups[n],
                        "generation": g,
                        "attacked": attacked,
                        "seed": seeds[n][g],
                        similarity.column: value,
                        "clip_score": score,
                        "denoising_loss": losses[n],
                    }
                )
            nearest = sorted(nearest, key=lambda entry: entry[:2])[: settings.gallery]
            # a view would hold its whole batch
            nearest = [(*place, np.array(image)) for *place, image in nearest]
            # quality is judged on captions that were never trained on, where there are any
            counted = [not has_reference or chosen.groups[n] == REFERENCE_GROUP for n, _ in part]
            if any(counted) and not attacked:
                self.distances.add(features[counted], real=False)
        return rows, torch.cat(all_compared), [(row, image) for _, row, image in nearest]

    def _search(self, rows: list[dict], features: Tensor) -> int:
        """Say in each row which training picture is the nearest, and how near; how many could be searched."""
        read: list[int] = []

        def seen(pixels: np.ndarray) -> Tensor:
            self.advance("nearest training pictures", len(read), len(self.pictures))
            latents = encode_images(self.denoiser, pixels, self.batches)
            return self.measures.similarity.features(Pictures(latents, pixels))

        blocks = self.pictures.blocks(self.size, seen, read)
        note_nearest(rows, features, self.measures.similarity, blocks, lambda place: self.samples.key(read[place]))
        return len(read)

    def _look_at_real_pictures(self) -> None:
        """As many pictures of the shards as are wanted, drawn by seed; what cannot be read is left out."""
        seed, readable = place_seed(self.settings.seed, Stream.REAL, 0, 0), []
        for position in draw_positions(self.samples, self.settings.fid_samples, seed):
            try:
                self.samples.get(position)
                readable.append(position)
            except BadSample as problem:
                log.warning("left out %s: %s", self.samples.key(position), problem)

        def work(rows: range) -> Tensor:
            return self.measures.features(self._pictures(readable[rows.start : rows.stop]))

        for features in self._over("shards' pictures", len(readable), work):
            self.distances.add(features, real=True)

    def _pairs(self, rows: list[dict], nearest: list[tuple[int, np.ndarray]]) -> list[Match]:
        similarity, pairs = self.measures.similarity, []
        nearest = sorted(nearest, key=lambda entry: -similarity.nearness(rows[entry[0]][similarity.column]))
        for number, image in nearest:
            row, sample = rows[number], number // self.settings.num_images_per_prompt % len(self.chosen)
            pairs.append(
                Match(
                    caption=row["caption"],
                    key=row["key"],
                    group=row["group"],
                    generated=image,
                    original=read_pictures(self.samples, [self.chosen.positions[sample]], self.size)[0],
                    said=f"{similarity.name} {row[similarity.column]:.3f}",
                    is_copy=row["is_copy"],
                    attacked=row["attacked"],
                )
            )
        return pairs
