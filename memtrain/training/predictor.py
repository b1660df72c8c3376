"""What the model says of samples: their draws, their encoded captions, the loss of the prediction and its score.

encode -> noise -> predict with the caption -> predict with the empty caption -> score

Training, validation and the reference set share it. It knows no trainer: the step and the rank's rows are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from memtrain.core import diffusion, losses
from memtrain.core.diffusion import Draws
from memtrain.core.exclusion import Observations
from memtrain.core.scores import text_conditional_magnitude
from memtrain.core.streams import Stream, place_seed
from memtrain.data.batches import Batch
from memtrain.models.base import DiffusionModel
from memtrain.models.conditioning import Conditioning
from memtrain.training.methods import Method
from memtrain.training.objective import Objective
from memtrain.training.stopwatch import Stopwatch

# (B,) first samples of the rows' pictures, (B,) timesteps, (B,) whose caption is not empty -> (B,) bool on the CPU,
# which rows are scored; None: all of them
Due = Callable[[Tensor, Tensor, Tensor], Tensor | None]


class Predictor:
    """Noises latents, predicts the noise with the caption and without, and compares: a loss and a score a sample.

    Args:
        model: the model family; its weights are read as they are at the moment.
        method: what is done to captions and embeddings.
        objective: how captions and noise are weighed.
        seed: of noise, timesteps and caption dropout; a row's draws depend on (seed, step, place) alone.
    """

    def __init__(self, model: DiffusionModel, method: Method, objective: Objective, seed: int):
        self.model, self.method, self.objective, self.seed = model, method, objective, seed
        self.scoring_time = Stopwatch()  # of the forward pass with the empty caption, and of the reference set

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def num_timesteps(self) -> int:
        return self.model.noise_process.num_timesteps

    def visit(self, batch: Batch, step: int, stream: Stream, due: Due | None = None) -> tuple[Tensor, Observations]:
        """Losses (B,), with a graph, and what the rows show; one path for what is trained on and what is held out.

        Args:
            batch: B rows, on the model's device.
            step: optimizer steps before this one.
            stream: TRAIN, or REFERENCE_ROW, whose rows have draws of their own and keep their captions.
            due: tells which rows are scored; None: all of them are.
        """
        # mean and standard deviation of the VAE's posterior, (B, C, h, w) each; a cache has (B, 2, C, h, w)
        cached = batch.posterior
        mean, std = self.model.encode_posterior(batch.images) if cached is None else cached.unbind(1)
        draws = self.draw(stream, step, batch.place.tolist(), mean.shape[1:])
        latents = self.model.sample_latents(mean, std, draws.posterior_noise)
        conditioning, has_caption = self._caption(batch, draws, step, stream)

        noise = draws.noise + self.objective.noise_offset * draws.offset_noise  # (B, C, h, w) + (B, C, 1, 1)
        rows_due = None if due is None else due(batch.picture, draws.timesteps, has_caption)
        loss, score = self.predict_and_score(latents, noise, draws.timesteps, conditioning, rows_due)

        captioned = has_caption.to(self.device) & batch.valid
        # rows that are not due have a score of 0, and so have those at which no caption could change a thing:
        # v-prediction where abar_t = 0, words that the tokenizer does not know. None of them says anything
        scored = captioned & (score != 0)
        return loss, Observations.of_visit(
            sample_index=batch.sample_index,
            picture=batch.picture,
            copies=batch.copies,
            timesteps=draws.timesteps,
            score=torch.where(scored, score, 0.0),
            loss=loss.detach(),
            group=batch.group,
            captioned=captioned,
            scored=scored,
            latent_numel=torch.full_like(batch.sample_index, latents[0].numel()),
        )

    def draw(self, stream: Stream, step: int, places: Sequence[int], latent_shape: Sequence[int]) -> Draws:
        """What is random about the rows at these places of a step, on the model's device."""
        process = self.model.noise_process
        return diffusion.draw(self.seed, stream, step, places, latent_shape, process).to(self.device)

    def _caption(self, batch: Batch, draws: Draws, step: int, stream: Stream) -> tuple[Conditioning, Tensor]:
        """What the network is told about the rows, and whose caption is not empty: (B,) bool, on the CPU."""
        trained = stream == Stream.TRAIN
        dropout = self.objective.caption_dropout if trained else 0.0
        method = Stream.METHOD if trained else Stream.REFERENCE_METHOD
        generators = [
            np.random.default_rng(place_seed(self.seed, method, step, place)) for place in batch.place.tolist()
        ]
        captions = self.method.captions(batch.captions, generators, self.model)
        dropped = (draws.uniform < dropout).tolist()
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        has_caption = torch.tensor([bool(caption) for caption in captions])
        captioned = has_caption.to(self.device)
        # embeddings of a cache serve where they are what the text encoder would give
        if batch.hidden is not None and not self.model.text_encoder_is_trained and not self.method.rewrites:
            null = self.model.null(len(captions)).map(Tensor.float)
            conditioning = replace(null, hidden=batch.hidden, pooled=batch.pooled).where(captioned, null)
        else:
            conditioning = self.model.encode_or_null(captions)
        hidden = self.method.embeddings(conditioning.hidden, captioned, generators)
        return replace(conditioning, hidden=hidden).sized(batch.sizes), has_caption

    def predict_and_score(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss, with a graph, and text-conditional magnitude, without one; both (B,) float32.

        The second forward pass shares x_t and t with the first and sees the empty caption.

        Args:
            latents, noise: (B, C, h, w), of which x_t is made.
            timesteps: (B,) int64.
            conditioning: the B encoded captions.
            due: (B,) bool, on the CPU; only these rows have a second forward pass, the others' score is 0.
        """
        model = self.model
        noisy = model.noise_process.add_noise(latents, noise, timesteps)
        prediction = model.predict(noisy, timesteps, conditioning)
        loss = losses.denoising_loss(prediction, model.noise_process.target(latents, noise, timesteps))
        with torch.no_grad(), self.scoring_time.running(noisy.device):
            if due is None:
                return loss, self._score(noisy, timesteps, prediction, conditioning)
            score = torch.zeros_like(loss)
            rows = due.nonzero()[:, 0].to(noisy.device)  # (D,), D of the B rows
            if len(rows):  # a UNet cannot have a batch of none
                score[rows] = self._score(noisy[rows], timesteps[rows], prediction[rows], conditioning.index(rows))
            return loss, score

    def _score(self, noisy: Tensor, timesteps: Tensor, prediction: Tensor, conditioning: Conditioning) -> Tensor:
        """Text-conditional magnitude of B rows, given the prediction (B, C, h, w) with their captions. (B,)"""
        model = self.model
        null = model.null(len(noisy)).sized(conditioning.time_ids)  # of the same pictures
        null_prediction = model.predict(noisy, timesteps, null)
        cond, uncond = (model.to_noise(p.float(), noisy, timesteps) for p in (prediction.detach(), null_prediction))
        return text_conditional_magnitude(cond, uncond)
