"""The reference set in training: samples that are scored, in turn, and never trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrain.core.diffusion import REFERENCE
from memtrain.core.exclusion import REFERENCE as REFERENCE_GROUP
from memtrain.core.exclusion import Observations

if TYPE_CHECKING:
    from memtrain.training.module import DiffusionTraining


class ReferenceSet:
    """Some of it after every k-th step, the next ones every time.

    Args:
        every: k.
        batch_size: how many, over all ranks.
    """

    def __init__(self, every: int, batch_size: int):
        if every < 1 or batch_size < 1:
            raise ValueError(f"reference.every and reference.batch_size must be >= 1, got {every} and {batch_size}")
        self.every, self.batch_size = every, batch_size
        self._encoded: tuple[Tensor, Tensor, list[str]] | None = None

    def observe(self, training: DiffusionTraining) -> Observations | None:
        """Score the samples whose turn it is on this rank, with the weights as they are now; None: nobody's."""
        trainer, step = training.trainer, training.global_step
        positions = trainer.datamodule.groups.reference
        if len(positions) == 0 or step % self.every:
            return None
        if self._encoded is None:  # once: the VAE is frozen
            self._encoded = training.encode_samples(positions)
        latents, index, captions = self._encoded
        per_rank = -(-self.batch_size // trainer.world_size)
        places = [trainer.global_rank * per_rank + row for row in range(per_rank)]
        first = step // self.every * per_rank * trainer.world_size
        rows = [(first + place) % len(captions) for place in places]
        captions = [captions[row] for row in rows]
        draws = training.draw(REFERENCE, places, training.latent_shape)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            hidden = training.encode_captions(captions)
            latents = latents[rows].to(training.device)
            loss, score = training.predict_and_score(latents, draws.noise, draws.timesteps, hidden)
        captioned = torch.tensor([bool(caption) for caption in captions], device=training.device)
        return Observations.of_visit(
            sample_index=index[rows],
            picture=index[rows],  # none of them has a duplicate
            timesteps=draws.timesteps,
            score=score,
            loss=loss,
            group=torch.full_like(index[rows], REFERENCE_GROUP),
            captioned=captioned,
            scored=captioned,
            latent_numel=torch.full_like(index[rows], latents[0].numel()),
        )
