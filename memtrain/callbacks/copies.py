"""Do generations copy their training sample, and since when?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch

from memtrain.callbacks.generation import Compared, compare
from memtrain.callbacks.guard import on_first_rank
from memtrain.callbacks.logging import log_metrics, log_picture
from memtrain.callbacks.steps import AfterEachStep
from memtrain.core.copies import checked_max_rmse, is_copy
from memtrain.core.exclusion import CANARY, GROUP_NAMES, REFERENCE, SACRIFICED
from memtrain.data.escaping import as_text
from memtrain.report.pictures import draw_samples, samples_of_picture
from memtrain.training.encoded import EncodedSamples

MEMORIZED = 0.5  # of a canary's generations are copies


class Copies(AfterEachStep):
    """Generates from the captions of canaries and reference samples with the averaged weights, and counts copies.

    A generation is a copy when its latents lie within `max_rmse` of the mean latents of the caption's own image
    (see `core.copies`). Reference images were never trained on, so their rate tells how often that is met by
    chance. Of a picture with duplicates, its first sample stands for all: rates count pictures, not samples.

    Logs `copy_rate/<group>`, `copy_rmse/<group>` and `memorized_canaries`, the share of the canaries looked
    at so far of which at least half of the generations were copies at some look. At the end it writes
    `samples.png`: some canaries' images beside four generations each.

    Args:
        every: optimizer steps between two looks at some canaries; 0 looks at the end alone.
        watched: so many canaries at each look.
        watched_images_per_prompt: of each of them.
        num_images_per_prompt: of each canary at the end; reference captions get half as many, at least one.
        reference: so many reference captions, at the end.
        num_inference_steps, guidance_scale: of the stock pipeline's sampler.
        max_rmse: the distance within which a generation is a copy.
        batch_size: generations at a time.
        shown: canaries in the picture; 0 draws none.
    """

    def __init__(
        self,
        every: int,
        watched: int,
        watched_images_per_prompt: int,
        num_images_per_prompt: int,
        reference: int,
        num_inference_steps: int,
        guidance_scale: float,
        max_rmse: float,
        batch_size: int,
        shown: int,
    ):
        for name, value, least in (
            ("every", every, 0),
            ("watched", watched, 1),
            ("watched_images_per_prompt", watched_images_per_prompt, 1),
            ("num_images_per_prompt", num_images_per_prompt, 1),
            ("reference", reference, 0),
            ("num_inference_steps", num_inference_steps, 1),
            ("batch_size", batch_size, 1),
            ("shown", shown, 0),
        ):
            if value < least:
                raise ValueError(f"callbacks.copies.{name} must be >= {least}, got {value}")
        self.every, self.watched, self.watched_images_per_prompt = every, watched, watched_images_per_prompt
        self.num_images_per_prompt, self.reference = num_images_per_prompt, reference
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.max_rmse = checked_max_rmse(max_rmse, "callbacks.copies.max_rmse")
        self.batch_size, self.shown = batch_size, shown
        # here: position of each canary looked at -> first look at which it was memorized, None: not yet
        self.memorized: dict[int, int | None] = {}
        self._watched: list[tuple[int, EncodedSamples]] | None = None

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if self.every and step % self.every == 0 and step != trainer.max_steps:
            self._watch(trainer, pl_module)

    @torch.no_grad()
    def _watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at some canaries, the same ones each time."""
        if self._watched is None:
            groups = trainer.datamodule.groups
            sacrificed, canaries = groups.one_each(groups.sacrificed), groups.one_each(groups.canary)
            # evenly spread over both groups, one after the other, and sorted into them again
            both = np.concatenate([sacrificed, canaries])
            chosen = np.arange(len(both))[:: max(1, -(-len(both) // self.watched))]
            self._watched = [
                (SACRIFICED, pl_module.encode_samples(both[chosen[chosen < len(sacrificed)]])),
                (CANARY, pl_module.encode_samples(both[chosen[chosen >= len(sacrificed)]])),
            ]
        with pl_module.averaged_weights():
            for number, samples in self._watched:
                self._look(trainer, pl_module, number, samples, self.watched_images_per_prompt)

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups = trainer.datamodule.groups
        fewer, drawn = max(1, self.num_images_per_prompt // 2), None
        with pl_module.averaged_weights():
            for number, positions, num_images in (
                (SACRIFICED, groups.one_each(groups.sacrificed), self.num_images_per_prompt),
                (CANARY, groups.one_each(groups.canary), self.num_images_per_prompt),
                (REFERENCE, groups.reference[: self.reference], fewer),
            ):
                samples = pl_module.encode_samples(positions)
                shown = self.shown if number == CANARY else 0
                found = self._look(trainer, pl_module, number, samples, num_images, shown)
                if shown and found:
                    drawn = samples, found
            if drawn is not None:  # when all is measured
                self._draw(trainer, pl_module, *drawn)

    def _look(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        number: int,
        samples: EncodedSamples,
        num_images_per_prompt: int,
        shown: int = 0,
    ) -> list[Compared]:
        """Generate from a group's captions, log how many are copies, and note who is memorized by now.

        Args:
            samples: of the group.
            shown: of the first so many samples the generated latents are kept, to be drawn.
        """
        index, captions = samples.positions, samples.captions
        if not captions:
            return []
        options = (self.num_inference_steps, self.guidance_scale, self.batch_size, shown)
        found = compare(trainer, pl_module, samples, num_images_per_prompt, *options)
        copied = np.zeros((len(captions), num_images_per_prompt), dtype=bool)  # (N, G)
        for one in found:
            copied[one.sample, one.generation] = is_copy(one.rmse, self.max_rmse)
        name = GROUP_NAMES[number]
        metrics = {
            f"copy_rate/{name}": float(copied.mean()),
            f"copy_rmse/{name}": float(np.median([one.rmse for one in found])),
        }
        if number != REFERENCE:
            for position, share in zip(index.tolist(), copied.mean(axis=1), strict=True):
                if self.memorized.get(position) is None:
                    self.memorized[position] = trainer.global_step if share >= MEMORIZED else None
            reached = [step is not None for step in self.memorized.values()]
            metrics["memorized_canaries"] = float(np.mean(reached))
        log_metrics(trainer, metrics)
        return found

    def memorized_at(self, trainer: pl.Trainer) -> dict[str, int | None]:
        """The step of the first look at which each canary looked at was memorized, by its key; None: not yet."""
        key = trainer.datamodule.samples.key
        return {as_text(key(position)): step for position, step in sorted(self.memorized.items())}

    @on_first_rank
    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, samples, found: list[Compared]) -> None:
        """Write `samples.png`: a row a canary, its image and its first four generations."""
        index, captions = samples.positions, samples.captions
        originals = trainer.datamodule.decode(index[: self.shown].tolist()).images.permute(0, 2, 3, 1).numpy()
        sizes = trainer.datamodule.groups.pictures.copies(index.cpu().numpy())
        rows = []
        for number, original in enumerate(originals):
            of = sorted((one for one in found if one.sample == number), key=lambda one: one.generation)[:4]
            images = pl_module.model.decode(torch.stack([one.latents for one in of]))
            label = f"{samples_of_picture(sizes[number])}: {captions[number]}".removeprefix(": ")
            rows.append((label, original, images, [one.rmse for one in of]))
        path = Path(trainer.default_root_dir) / "samples.png"
        draw_samples(path, rows, self.max_rmse)
        log_picture(trainer, "samples", path)

    def state_dict(self) -> dict:
        return {"memorized": self.memorized}

    def load_state_dict(self, state_dict: dict) -> None:
        self.memorized = dict(state_dict["memorized"])
