"""At the end of a run: do generations copy their training sample?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from memtrain.callbacks.generation import decode, generate
from memtrain.callbacks.logging import from_all_ranks, log_metrics, log_picture, share_of_rank
from memtrain.core.diffusion import GENERATION, place_seed
from memtrain.core.exclusion import CANARY, GROUP_NAMES, REFERENCE
from memtrain.report.pictures import draw_samples


class Copies(pl.Callback):
    """Generate from the captions of canaries and reference samples, with the averaged weights.

    A generation is a copy when the root mean square difference between its latents and the mean latents of
    the caption's own image is at most `max_rmse` (Carlini et al. 2023, section 4.1, normalised by the number
    of elements; scaled latents have unit variance). Reference images were never trained on, so their rate
    tells how often the cut is met by chance.

    Logs `copy_rate/<group>` and writes `samples.png`: some canaries' images beside four generations each.

    Args:
        generations: of each canary; reference captions get half as many, at least one.
        reference: so many reference captions.
        num_steps, guidance_scale: of the stock pipeline's DDIM sampler.
        max_rmse: the cut.
        batch_size: generations at a time.
        shown: canaries in the picture.
    """

    def __init__(
        self,
        generations: int,
        reference: int,
        num_steps: int,
        guidance_scale: float,
        max_rmse: float,
        batch_size: int,
        shown: int,
    ):
        if generations < 1 or num_steps < 1 or batch_size < 1:
            raise ValueError("callbacks.copies: generations, num_steps and batch_size must be >= 1")
        if not max_rmse > 0:
            raise ValueError(f"callbacks.copies.max_rmse must be > 0, got {max_rmse:g}")
        self.generations, self.reference = generations, reference
        self.num_steps, self.guidance_scale = num_steps, guidance_scale
        self.max_rmse, self.batch_size, self.shown = max_rmse, batch_size, shown

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups = trainer.datamodule.groups
        pictures = min(4, self.generations)
        with pl_module.averaged_weights():
            for number, positions, generations in (
                (CANARY, groups.canary, self.generations),
                (REFERENCE, groups.reference[: self.reference], max(1, self.generations // 2)),
            ):
                latents, index, captions = pl_module.encode_samples(positions)
                if not captions:
                    continue
                wanted = [(n, g) for n in range(len(captions)) for g in range(generations)]
                found = self._generate(trainer, pl_module, share_of_rank(trainer, wanted), latents, index, captions)
                found = from_all_ranks(trainer, found)
                rmse = [distance for _, distance, _ in found]
                log_metrics(
                    trainer,
                    {
                        f"copy_rate/{GROUP_NAMES[number]}": float(np.mean(np.array(rmse) <= self.max_rmse)),
                        f"copy_rmse/{GROUP_NAMES[number]}": float(np.median(rmse)),
                    },
                )
                if number == CANARY and trainer.is_global_zero:
                    generated = {place: (image, distance) for place, distance, image in found}
                    self._draw(trainer, pl_module, latents, captions, generated, pictures)

    def _generate(self, trainer, pl_module, wanted, latents: Tensor, index: Tensor, captions: list[str]) -> list:
        """[((sample, generation), RMSE, latents or None)] of this rank's share."""
        found, pipeline = [], pl_module.model.pipeline()
        for first in range(0, len(wanted), self.batch_size):
            part = wanted[first : first + self.batch_size]
            generated = generate(
                trainer,
                pipeline,
                [captions[n] for n, _ in part],
                [place_seed(pl_module.seed, GENERATION, int(index[n]), g) for n, g in part],
                pl_module.latent_shape,
                self.num_steps,
                self.guidance_scale,
            )
            rmse = (generated - latents[[n for n, _ in part]]).square().flatten(1).mean(dim=1).sqrt()  # (B,)
            for place, distance, image in zip(part, rmse.tolist(), generated, strict=True):
                found.append((place, distance, image if place[0] < self.shown else None))
        return found

    def _draw(self, trainer, pl_module, latents, captions, generated, pictures: int) -> None:
        batch = trainer.datamodule.decode(trainer.datamodule.groups.canary[: self.shown])
        originals = batch.images[batch.valid].permute(0, 2, 3, 1).numpy()
        rows = []
        for number, original in enumerate(originals):
            places = [(number, generation) for generation in range(pictures)]
            images = decode(pl_module.model, torch.stack([generated[place][0] for place in places]))
            rows.append((captions[number], original, images, [generated[place][1] for place in places]))
        path = Path(trainer.default_root_dir) / "samples.png"
        draw_samples(path, rows, self.max_rmse)
        log_picture(trainer, "samples", path)
