"""A grid of generations from fixed prompts and seeds, as training goes on."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl

from memtrain.callbacks.generation import generate
from memtrain.callbacks.guard import on_first_rank
from memtrain.callbacks.logging import log_picture
from memtrain.callbacks.steps import AfterEachStep
from memtrain.core.streams import Stream, place_seed
from memtrain.report.pictures import draw_grid


class SampleGrid(AfterEachStep):
    """Writes `grids/step-<step>.png`: a row a prompt, the same start noise every time, averaged weights.

    Args:
        every: optimizer steps between two grids; 0 draws one at the end alone.
        prompts: fixed prompts; where there are none, captions of the reference set.
        columns: generations of each prompt.
        num_inference_steps, guidance_scale: of the stock pipeline's sampler.
    """

    def __init__(self, every: int, prompts: list[str], columns: int, num_inference_steps: int, guidance_scale: float):
        for name, value, least in (
            ("every", every, 0),
            ("columns", columns, 1),
            ("num_inference_steps", num_inference_steps, 1),
        ):
            if value < least:
                raise ValueError(f"callbacks.sample_grid.{name} must be >= {least}, got {value}")
        self.every, self.prompts, self.columns = every, list(prompts), columns
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.drawn_at = -1

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every and trainer.global_step % self.every == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self.drawn_at:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.drawn_at = trainer.global_step
        with pl_module.averaged_weights():
            self._draw_one(trainer, pl_module)

    @on_first_rank
    def _draw_one(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        prompts = self.prompts or trainer.datamodule.decode(trainer.datamodule.groups.reference[:4]).captions
        if not prompts:
            return
        latents = generate(
            trainer,
            pl_module.model,
            pl_module.model.pipeline(),
            [prompt for prompt in prompts for _ in range(self.columns)],
            [place_seed(pl_module.seed, Stream.GENERATION, 0, n) for _ in prompts for n in range(self.columns)],
            pl_module.latent_shape,
            self.num_inference_steps,
            self.guidance_scale,
        )
        path = Path(trainer.default_root_dir) / "grids" / f"step-{trainer.global_step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        images = pl_module.model.decode(latents)
        draw_grid(path, prompts, images.reshape(len(prompts), self.columns, *images.shape[1:]))
        log_picture(trainer, "samples_of_fixed_prompts", path)
