"""What the model says of samples: their draws, their encoded captions, the loss of the prediction and its score.

encode -> noise -> predict with the caption -> predict with the empty caption, or by the run's base -> score

Training, validation and the reference set share it. It knows no trainer: the step and the rank's rows are arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from memtrain.core import diffusion, losses
from memtrain.core.diffusion import Draws
from memtrain.core.exclusion import Observations
from memtrain.core.scores import ANCHORED, anchored_magnitude, text_conditional_magnitude
from memtrain.core.streams import Stream, place_seed
from memtrain.core.transfer import sent
from memtrain.data.batches import Batch
from memtrain.models.anchors import Anchor
from memtrain.models.base import DiffusionModel
from memtrain.models.conditioning import Conditioning
from memtrain.training.methods import Method
from memtrain.training.objective import Objective
from memtrain.training.score_memory import Scoring
from memtrain.training.stopwatch import Stopwatch

# (B,) first samples of the rows' pictures, (B,) timesteps, (B,) whose caption is not empty -> (B,) bool, all on the
# CPU, which rows are scored; None: all of them
Due = Callable[[Tensor, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Told:
    """B captions as the networks are told them, and as the networks that the run began with are."""

    own: Conditioning
    base: Conditioning  # the same, but where text encoders are trained

    def map(self, change: Callable[[Conditioning], Conditioning]) -> Told:
        """The same change made to both."""
        own = change(self.own)
        return Told(own, own if self.base is self.own else change(self.base))


@dataclass(frozen=True)
class Prediction:
    """What came of B predictions."""

    loss: Tensor  # (B,) float32, with a graph
    score: Tensor  # (B,) float32, that the exclusion rule goes by; 0 where it was not taken
    second_score: Tensor  # (B,) float32, that is taken beside it; 0 where none is
    output: Tensor  # (B, C, h, w), of the network, with a graph
    noisy_latents: Tensor  # (B, C, h, w), that it was of
    null_output: Tensor | None  # (B, C, h, w), the same with the empty caption, where a score of all rows took it


@dataclass(frozen=True)
class Visit:
    """What came of the rows of a batch: what is told to rules, and what it was made of."""

    observed: Observations
    found: Prediction
    told: Told


class Predictor:
    """Noises latents, predicts the noise with the caption and without, and compares: a loss and a score a sample.

    Args:
        model: the model family; its weights are read as they are at the moment.
        method: what is done to captions and embeddings.
        objective: how captions and noise are weighed.
        seed: of noise, timesteps and caption dropout; a row's draws depend on (seed, step, place) alone.
        scoring: which scores are taken.
        anchor: gives the model its base back; needed for the anchored score alone.
    """

    def __init__(
        self,
        model: DiffusionModel,
        method: Method,
        objective: Objective,
        seed: int,
        scoring: Scoring,
        anchor: Anchor | None,
    ):
        self.model, self.method, self.objective, self.seed = model, method, objective, seed
        self.scoring, self.anchor = scoring, anchor
        self.scoring_time = Stopwatch()  # of the forward passes that scores take, and of the reference set

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def num_timesteps(self) -> int:
        return self.model.noise_process.num_timesteps

    def visit(self, batch: Batch, step: int, stream: Stream, due: Due | None = None) -> Visit:
        """Losses, with a graph, and what B rows show; one path for what is trained on and what is held out.

        Args:
            batch: B rows, on the model's device.
            step: optimizer steps before this one.
            stream: TRAIN, or REFERENCE_ROW, whose rows have draws of their own and keep their captions.
            due: tells which rows are scored; None: all of them are.
        """
        # mean and standard deviation of the VAE's posterior, (B, C, h, w) each; a cache has (B, 2, C, h, w)
        cached = batch.posterior
        mean, std = self.model.encode_posterior(batch.images) if cached is None else cached.unbind(1)
        drawn = self.draw(stream, step, batch.on_host.place.tolist(), mean.shape[1:])
        draws = drawn.to(self.device)
        latents = self.model.sample_latents(mean, std, draws.posterior_noise)
        told, has_caption = self._caption(batch, drawn, step, stream)

        noise = draws.noise + self.objective.noise_offset * draws.offset_noise  # (B, C, h, w) + (B, C, 1, 1)
        rows_due = None if due is None else due(batch.on_host.picture, drawn.timesteps, has_caption)
        found = self.predict_and_score(latents, noise, draws.timesteps, told, rows_due)

        captioned = sent(has_caption, self.device) & batch.valid
        # rows that are not due have a score of 0, and so have those at which no caption could change a thing:
        # v-prediction where abar_t = 0, words that the tokenizer does not know; an anchored score where nothing is
        # learnt yet. None of them says anything
        scored = captioned & (found.score != 0)
        observed = Observations.of_visit(
            sample_index=batch.sample_index,
            picture=batch.picture,
            copies=batch.copies,
            timesteps=draws.timesteps,
            score=torch.where(scored, found.score, 0.0),
            second_score=torch.where(captioned, found.second_score, 0.0),
            loss=found.loss.detach(),
            group=batch.group,
            captioned=captioned,
            scored=scored,
            latent_numel=torch.full_like(batch.sample_index, latents[0].numel()),
        )
        return Visit(observed, found, told)

    def pull(self, visit: Visit, rows: Tensor) -> Tensor:
        """Squared distance of these rows' predictions from those for the empty caption, in the unit of the loss.

        It has a graph through the first alone. Where it falls the caption loses what it had to say of its picture,
        and nothing else does: what is predicted without a caption stays as it is (docs/method.md).

        Args:
            visit: of B rows.
            rows: (R,) int64, R of them; the forward pass that it takes is of no others.

        Returns:
            (R,) float32
        """
        found = visit.found
        if found.null_output is not None:
            null = found.null_output[rows]
        else:
            with torch.no_grad():
                null = self._without_caption(
                    found.noisy_latents[rows], visit.observed.timesteps[rows], visit.told.own.index(rows)
                )
        return losses.denoising_loss(found.output[rows], null)

    def draw(self, stream: Stream, step: int, places: Sequence[int], latent_shape: Sequence[int]) -> Draws:
        """What is random about the rows at these places of a step, on the CPU."""
        return diffusion.draw(self.seed, stream, step, places, latent_shape, self.model.noise_process)

    def encode(self, captions: list[str], encode: Callable[[list[str]], Conditioning]) -> Told:
        """Captions as the model's text encoders give them by this function of its, and as those of its base do."""
        own = encode(captions)
        if self.anchor is None or not self.model.text_encoder_is_trained:
            return Told(own, own)
        with torch.no_grad(), self.scoring_time.running(self.device), self.anchor.in_place(self.model):
            return Told(own, encode(captions))

    def _caption(self, batch: Batch, drawn: Draws, step: int, stream: Stream) -> tuple[Told, Tensor]:
        """What the networks are told about the rows, and whose caption is not empty: (B,) bool, on the CPU.

        Args:
            drawn: on the CPU.
        """
        trained = stream == Stream.TRAIN
        dropout = self.objective.caption_dropout if trained else 0.0
        method = Stream.METHOD if trained else Stream.REFERENCE_METHOD
        generators = [
            np.random.default_rng(place_seed(self.seed, method, step, place)) for place in batch.on_host.place.tolist()
        ]
        captions = self.method.captions(batch.captions, generators, self.model)
        dropped = (drawn.uniform < dropout).tolist()
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        has_caption = torch.tensor([bool(caption) for caption in captions])
        captioned = sent(has_caption, self.device)
        # embeddings of a cache serve where they are what the text encoder would give
        if batch.hidden is not None and not self.model.text_encoder_is_trained and not self.method.rewrites:
            null = self.model.null(len(captions)).map(Tensor.float)
            own = replace(null, hidden=batch.hidden, pooled=batch.pooled).where(captioned, null)
            told = Told(own, own)
        else:
            told = self.encode(captions, self.model.encode_or_null)

        def embedded(conditioning: Conditioning, generators: list[np.random.Generator]) -> Conditioning:
            hidden = self.method.embeddings(conditioning.hidden, captioned, generators)
            return replace(conditioning, hidden=hidden).sized(batch.sizes)

        again = copy.deepcopy(generators) if told.base is not told.own else None  # for the same draws
        own = embedded(told.own, generators)
        return Told(own, own if again is None else embedded(told.base, again)), has_caption

    def predict_and_score(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, told: Told, due: Tensor | None = None
    ) -> Prediction:
        """Loss, with a graph, and scores, without one.

        Each score is of one more forward pass, which shares x_t and t with the first: with the empty caption, or with
        the same one by the weights that the run began with.

        Args:
            latents, noise: (B, C, h, w), of which x_t is made.
            timesteps: (B,) int64.
            told: the B encoded captions.
            due: (B,) bool, on the CPU; only these rows have more forward passes, the others' scores are 0.
        """
        model = self.model
        noisy = model.noise_process.add_noise(latents, noise, timesteps)
        output = model.predict(noisy, timesteps, told.own)
        loss = losses.denoising_loss(output, model.noise_process.target(latents, noise, timesteps))
        with torch.no_grad(), self.scoring_time.running(noisy.device):
            if due is None:
                scores, null = self._scores(noisy, timesteps, output, told)
                return Prediction(loss, scores[0], scores[1], output, noisy, null)
            scores = loss.new_zeros(2, len(loss))
            rows = sent(due.nonzero()[:, 0], noisy.device)  # (D,), D of the B rows
            if len(rows):  # a UNet cannot have a batch of none
                told = told.map(lambda conditioning: conditioning.index(rows))
                scores[:, rows], _ = self._scores(noisy[rows], timesteps[rows], output[rows], told)
            return Prediction(loss, scores[0], scores[1], output, noisy, null_output=None)

    def _scores(self, noisy: Tensor, timesteps: Tensor, output: Tensor, told: Told) -> tuple[Tensor, Tensor | None]:
        """The rule's score and the second one of B rows, given the output (B, C, h, w) with their captions. (2, B)

        The second one is 0 where there is none. With them comes the output with the empty caption, where it was taken.
        """
        noise_pred = self.model.to_noise(output.detach().float(), noisy, timesteps)
        taken: list[Tensor] = []
        null = None
        for kind in (self.scoring.rule, self.scoring.second):
            if kind is None:
                taken.append(torch.zeros_like(taken[0]))
            elif kind == ANCHORED:
                assert self.anchor is not None
                with self.anchor.in_place(self.model):
                    base = self.model.predict(noisy, timesteps, told.base)
                taken.append(anchored_magnitude(noise_pred, self.model.to_noise(base.float(), noisy, timesteps)))
            else:
                null = self._without_caption(noisy, timesteps, told.own)
                null_pred = self.model.to_noise(null.float(), noisy, timesteps)
                taken.append(text_conditional_magnitude(noise_pred, null_pred))
        return torch.stack(taken), null

    def _without_caption(self, noisy: Tensor, timesteps: Tensor, told: Conditioning) -> Tensor:
        """The network's output for the same pictures, told the empty caption in place of these. (B, C, h, w)"""
        return self.model.predict(noisy, timesteps, self.model.null(len(noisy)).sized(told.time_ids))
