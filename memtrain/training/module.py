"""The LightningModule: what happens to a batch, in order.

encode -> noise -> predict with the caption -> predict with the empty caption -> score -> exclude -> loss
"""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from memtrain.core import diffusion, losses
from memtrain.core.diffusion import METHOD, REFERENCE, TRAIN, Draws, draw, place_seed
from memtrain.core.exclusion import REFERENCE as REFERENCE_GROUP
from memtrain.core.exclusion import SACRIFICED, Decision, ExclusionRule, Observations
from memtrain.core.scores import text_conditional_magnitude
from memtrain.data.batches import Batch
from memtrain.models.base import DiffusionModel, trained_parameters
from memtrain.training import ranks, strategy
from memtrain.training.average import AveragedWeights
from memtrain.training.methods import Method
from memtrain.training.optimizers import AdamW
from memtrain.training.score_memory import ScoreMemory, Scoring
from memtrain.training.stops import Stops, are_finite, only_finite
from memtrain.training.stopwatch import Stopwatch

log = logging.getLogger(__name__)

DENOMINATORS = ("kept", "all")
FROZEN_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class DiffusionTraining(pl.LightningModule):
    """Fine-tune a diffusion model, score every sample at every step, leave the memorized out of the loss.

    Args:
        model: the model family.
        exclusion: the rule that decides who is left out.
        method: what is done to captions and embeddings.
        optimizer: optimizer and schedule of the trained weights.
        seed: of noise, timesteps and caption dropout; a row's draws depend on (seed, step, place) alone.
        resolution: side of the pictures, px.
        caption_dropout: share of captions replaced by the empty one.
        min_snr_gamma: gamma of the min-SNR weights; None weights every timestep alike.
        noise_offset: amplitude of offset noise, one value a channel (Guttenberg 2023); 0 for none.
        denominator: divide the summed loss by the `kept` samples of the optimizer step, or by `all`.
        scoring: which visits are scored.
        reference_every: score reference samples after every k-th step.
        reference_batch: how many of them, over all ranks.
        ema_decay: of the averaged weights, with warm-up; 0 keeps no average.
        max_bad_steps: so many steps in a row whose loss or gradient is not finite end the run; fewer are skipped.
    """

    def __init__(
        self,
        model: DiffusionModel,
        exclusion: ExclusionRule,
        optimizer: AdamW,
        method: Method,
        *,
        seed: int,
        resolution: int,
        caption_dropout: float,
        min_snr_gamma: float | None,
        noise_offset: float,
        denominator: str,
        scoring: Scoring,
        reference_every: int,
        reference_batch: int,
        ema_decay: float,
        max_bad_steps: int = 10,
    ):
        super().__init__()
        if denominator not in DENOMINATORS:
            raise ValueError(f"loss.denominator must be one of {', '.join(DENOMINATORS)}, got {denominator}")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"loss.caption_dropout is a share in [0, 1], got {caption_dropout:g}")
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"loss.min_snr_gamma must be > 0 or null, got {min_snr_gamma:g}")
        if scoring.every == 0 and exclusion.needs_score:
            raise ValueError("score.every=0 (never) is for rules that need no score, none and agc; set it to 1")
        if scoring.timesteps is not None and scoring.timesteps[1] > len(model.alphas_cumprod):
            raise ValueError(f"score.timesteps ends at {len(model.alphas_cumprod)} at most, got {scoring.timesteps[1]}")
        if reference_every < 1 or reference_batch < 1:
            raise ValueError(
                f"reference.every and reference.batch_size must be >= 1, got {reference_every} and {reference_batch}"
            )
        self.model, self.exclusion, self.optimizer_config, self.method = model, exclusion, optimizer, method
        self.seed = seed
        self.latent_shape = model.latent_shape(resolution, resolution)
        self.caption_dropout, self.min_snr_gamma, self.noise_offset = caption_dropout, min_snr_gamma, noise_offset
        self.denominator, self.scoring = denominator, scoring
        self.memory: ScoreMemory | None = None
        self.scoring_time = Stopwatch()
        self.reference_every, self.reference_batch = reference_every, reference_batch
        self.ema = AveragedWeights(ema_decay)
        self.stops = Stops(max_bad_steps)
        self.mid_step = False  # weights, average and rule are not yet all those of one step
        self.strict_loading = False  # checkpoints hold trained weights alone
        self.updates_skipped = 0
        self.samples_seen = 0
        self.samples_bad = 0
        self._reference: tuple[Tensor, Tensor, list[str]] | None = None
        self._start_window()

    # ---- set-up

    @property
    def num_timesteps(self) -> int:
        return len(self.model.alphas_cumprod)

    def trained_parameters(self) -> list[nn.Parameter]:
        return trained_parameters(self.model)

    def setup(self, stage: str) -> None:
        if self.trainer.precision not in FROZEN_DTYPES:
            raise ValueError(
                f"trainer.precision must be one of {', '.join(FROZEN_DTYPES)}, got {self.trainer.precision}"
            )
        self.model.prepare_frozen(FROZEN_DTYPES[self.trainer.precision])
        numel = self.latent_shape[0] * self.latent_shape[1] * self.latent_shape[2]
        for size in self.trainer.datamodule.samples.sizes:
            self.model.latent_shape(*size)  # raises where the model cannot have it
        num_samples = self.trainer.datamodule.groups.num_samples
        self.exclusion.setup(num_samples, numel, self.num_timesteps)
        if self.scoring.remembers:
            self.memory = ScoreMemory(num_samples, self.scoring)

    def configure_model(self) -> None:
        """Shard what is trained where the strategy has a mesh for it (trainer=fsdp); begin the average."""
        bones = {}
        if self.device_mesh is not None:
            if self.memory:
                raise ValueError("trainer=fsdp scores every row or none; set score.every_visits=1 score.timesteps=null")
            if self.optimizer_config.eight_bit:
                raise ValueError("trainer=fsdp cannot shard optimizer=adamw8bit; use optimizer=adamw")
            bones = strategy.shard_trained(self.model, self.device_mesh["data_parallel"])
        self.ema.begin(self.model, bones)

    def configure_optimizers(self):
        optimizer, schedule = self.optimizer_config.build(self.trained_parameters(), self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        self.ema.to(self.device)

    # ---- one micro-batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.trainer.datamodule.report(batch)
        mean, std = batch.posterior.unbind(1) if batch.is_cached else self.model.encode_posterior(batch.images)
        draws = self._draw(TRAIN, self.global_step, batch.place.tolist(), mean.shape[1:])
        latents = self.model.sample_latents(mean, std, draws.posterior_noise)
        generators = [
            np.random.default_rng(place_seed(self.seed, METHOD, self.global_step, place))
            for place in batch.place.tolist()
        ]
        captions = self.method.captions(batch.captions, generators, self.model)
        dropped = draws.uniform < self.caption_dropout
        captions = ["" if drop else c for c, drop in zip(captions, dropped.tolist(), strict=True)]
        captioned = torch.tensor([bool(caption) for caption in captions], device=self.device) & batch.valid
        if batch.is_cached and not self.model.text_encoder_is_trained and not self.method.rewrites:
            hidden = torch.where(captioned[:, None, None], batch.hidden, self.model.null_caption().float())
        else:
            hidden = self.encode_captions(captions)
        hidden = self.method.embeddings(hidden, captioned, generators)

        noise = draws.noise + self.noise_offset * draws.offset_noise
        due = self._due(batch.sample_index, draws.timesteps)
        if due is not None:
            due &= torch.tensor([bool(caption) for caption in captions])
        loss, score = self.predict_and_score(latents, noise, draws.timesteps, hidden, due)
        weights = torch.ones_like(loss)
        if self.min_snr_gamma is not None:
            weights = losses.min_snr_weights(
                draws.timesteps, self.model.alphas_cumprod, self.min_snr_gamma, self.model.prediction_type
            )
        scored = captioned if due is None else captioned & due.to(self.device)
        known, score_timesteps = scored, draws.timesteps
        if self.memory:
            last, last_timesteps = self.memory.recall(batch.sample_index)
            remembered = captioned & ~scored & ~last.isnan()
            known = scored | remembered
            score = torch.where(remembered, last, score)
            score_timesteps = torch.where(remembered, last_timesteps, score_timesteps)
        observed = Observations(
            sample_index=batch.sample_index,
            timesteps=draws.timesteps,
            score=torch.where(known, score, 0.0),
            loss=loss.detach(),
            group=batch.group,
            captioned=captioned,
            scored=scored,
            known=known,
            score_timesteps=score_timesteps,
        )
        decision = self._decide(observed, batch.valid, self.global_step)
        self._window.append((observed, decision, batch.valid))
        self._log_progress(observed, decision, batch.valid)
        return losses.masked_sum(loss, weights, decision.keep_mask)

    def _due(self, sample_index: Tensor, timesteps: Tensor) -> Tensor | None:
        """Which rows are scored now: (B,) bool on the CPU; None for all of them, without a look at the data."""
        if self.scoring.every == 0 or self.global_step % self.scoring.every:
            return torch.zeros(len(timesteps), dtype=torch.bool)
        return self.memory.due(sample_index, timesteps) if self.memory else None

    def _draw(self, stream: int, step: int, places: list[int], latent_shape: tuple[int, int, int]) -> Draws:
        return draw(self.seed, stream, step, places, latent_shape, self.num_timesteps).to(self.device)

    def encode_captions(self, captions: list[str]) -> Tensor:
        """(B, L, D) encoder_hidden_states."""
        return self.model.encode_captions(self.model.tokenize(captions).to(self.device))

    def predict_and_score(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, hidden: Tensor, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss, with a graph, and text-conditional magnitude, without one; both (B,) float32.

        `hidden` (B, L, D) are the encoded captions. The second forward shares x_t and t with the first and sees
        the empty caption. `due` (B,) bool, on the CPU: only these rows have one, the others' score is 0.
        """
        model = self.model
        noisy = diffusion.add_noise(latents, noise, timesteps, model.alphas_cumprod)
        target = diffusion.prediction_target(latents, noise, timesteps, model.alphas_cumprod, model.prediction_type)
        prediction = model.predict(noisy, timesteps, hidden)
        loss = losses.denoising_loss(prediction, target)
        with torch.no_grad(), self.scoring_time.running(noisy.device):
            if due is None:
                return loss, self._score(noisy, timesteps, prediction)
            score = torch.zeros_like(loss)
            rows = due.nonzero()[:, 0]
            rows = (_padded(rows, len(noisy)) if model.compiled else rows).to(noisy.device)
            if len(rows):  # a UNet cannot have a batch of none
                score[rows] = self._score(noisy[rows], timesteps[rows], prediction[rows])
            return loss, score

    def _score(self, noisy: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """Text-conditional magnitude of B rows, given the prediction with their captions. (B,)"""
        model = self.model
        null_prediction = model.predict(noisy, timesteps, model.null_caption().expand(len(noisy), -1, -1))
        cond, uncond = (
            diffusion.to_noise(p.float(), noisy, timesteps, model.alphas_cumprod, model.prediction_type)
            for p in (prediction.detach(), null_prediction)
        )
        return text_conditional_magnitude(cond, uncond)

    def _decide(self, observed: Observations, valid: Tensor, step: int) -> Decision:
        """The rule's decision; what says nothing is kept, what cannot be decoded is not trained on."""
        decision = self.exclusion.decide(observed)
        decidable = observed.known if self.exclusion.needs_score else observed.captioned
        free = ~decidable | (observed.group == SACRIFICED)
        if step < self.exclusion.start_step:
            free = torch.ones_like(free)
        return Decision((decision.keep_mask | free) & valid, decision.threshold)

    def _log_progress(self, observed: Observations, decision: Decision, valid: Tensor) -> None:
        rows = valid.sum().clamp(min=1)
        self.log_dict(
            {
                "loss": torch.where(valid, observed.loss, 0.0).sum() / rows,
                "score": observed.score.sum() / observed.scored.sum().clamp(min=1),
                "excluded": (valid & ~decision.keep_mask).sum() / rows,
            },
            prog_bar=True,
            logger=False,
            batch_size=len(valid),
        )

    # ---- one optimizer step: all ranks, all micro-batches

    def _start_window(self) -> None:
        self._window: list[tuple[Observations, Decision, Tensor]] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the summed gradient by the samples of the whole optimizer step (METHOD: "the right denominator").

        Lightning has divided each micro-batch's sum by the number of micro-batches and DDP by the number of
        ranks; both are undone here. Runs before clipping, and after fp16 gradients are unscaled.
        """
        counts = torch.stack(
            [sum(d.keep_mask.sum() for _, d, _ in self._window), sum(valid.sum() for _, _, valid in self._window)]
        ).float()
        gradients = [p.grad for p in self.trained_parameters() if p.grad is not None]
        observed = torch.cat([valid & ~(o.loss + o.score).isfinite() for o, _, valid in self._window])
        reported = self.stops.report(observed.any() | ~are_finite([strategy.own_part(g) for g in gradients]))
        kept, rows, *reported = ranks.all_reduce(self.trainer, torch.cat([counts, reported])).tolist()
        seen = self.samples_seen + round(rows)
        bad = self.samples_bad + self.trainer.datamodule.global_batch_size - round(rows)
        self.trainer.datamodule.check_bad(bad, bad + seen)
        self.mid_step, self.samples_seen, self.samples_bad = True, seen, bad
        self.last_step_bad = self.stops.agree(reported, self.global_step, self._blamed(observed) if reported[0] else ())
        self.last_update_skipped = kept == 0 or self.last_step_bad
        if self.last_update_skipped:
            for parameter in self.trained_parameters():
                parameter.grad = None  # optimizers pass over it: no momentum step, no weight decay
            self.updates_skipped += not self.last_step_bad
            if self.updates_skipped == 1 and not self.last_step_bad:
                log.warning(
                    "step %d: every sample was excluded, so there is no update (this is counted; said once)",
                    self.global_step,
                )
            return
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size
        torch._foreach_mul_(gradients, factor / (kept if self.denominator == "kept" else rows))

    def _blamed(self, rows: Tensor) -> list[str]:
        """Keys of these rows (bool) of the step on this rank; of all, where none is marked."""
        index = torch.cat([observed.sample_index for observed, _, _ in self._window])
        return [self.trainer.datamodule.samples.key(i) for i in (index[rows] if rows.any() else index).tolist()]

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        if not self.last_update_skipped:
            self.ema.step()
        self.step_observed = Observations.concatenate([observed for observed, _, _ in self._window])
        if self.last_step_bad:
            self.step_observed = only_finite(self.step_observed)
        self.step_kept = torch.cat([decision.keep_mask for _, decision, _ in self._window])
        self.step_threshold = torch.cat([decision.threshold for _, decision, _ in self._window])
        self._start_window()
        self._observe_reference()
        if (self.exclusion.learns or self.memory) and not self.last_step_bad:
            trained, reference = self._gather_step()
            if self.memory:
                self.memory.update(trained)
            if self.exclusion.learns:
                self.exclusion.update(Observations.concatenate([trained, *reference]))
        self.mid_step = False

    def on_train_batch_end(self, outputs, batch: Batch, batch_idx: int) -> None:
        """Where the run is to stop, it does so here: the callbacks, the checkpoint last, are done with the step."""
        if self.stops.reason is not None:
            raise self.stops.reason

    def _observe_reference(self) -> None:
        """Score the next reference samples, with the weights as they are now; they are never trained on."""
        self.reference_observed, self.reference_kept, self.reference_threshold = None, None, None
        step = self.global_step
        held_out = self.trainer.datamodule.groups.reference
        if self.scoring.every == 0 or len(held_out) == 0 or step % self.reference_every:
            return
        latents, index, captions = self.reference_set()
        per_rank = -(-self.reference_batch // self.trainer.world_size)
        places = [self.trainer.global_rank * per_rank + row for row in range(per_rank)]
        turn = step // self.reference_every * per_rank * self.trainer.world_size
        rows = [(turn + place) % len(index) for place in places]
        draws = self._draw(REFERENCE, step, places, self.latent_shape)
        captions = [captions[row] for row in rows]
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            loss, score = self.predict_and_score(
                latents[rows].to(self.device), draws.noise, draws.timesteps, self.encode_captions(captions)
            )
        captioned = torch.tensor([bool(caption) for caption in captions], device=self.device)
        self.reference_observed = Observations(
            sample_index=index[rows],
            timesteps=draws.timesteps,
            score=score,
            loss=loss,
            group=torch.full_like(index[rows], REFERENCE_GROUP),
            captioned=captioned,
            scored=captioned,
            known=captioned,
            score_timesteps=draws.timesteps,
        )
        decision = self._decide(self.reference_observed, torch.ones_like(captioned), step)
        self.reference_kept, self.reference_threshold = decision.keep_mask, decision.threshold

    def reference_set(self) -> tuple[Tensor, Tensor, list[str]]:
        """Latents (R, C, H, W) on the CPU, positions (R,) on the device, captions. Encoded once: the VAE is frozen."""
        if self._reference is None:
            self._reference = self.encode_samples(self.trainer.datamodule.groups.reference)
        return self._reference

    @torch.no_grad()
    def encode_samples(self, positions, batch_size: int = 32) -> tuple[Tensor, Tensor, list[str]]:
        """Mean latents (N, C, H, W) on the CPU, positions (N,) on the device and captions of readable samples."""
        latents, index, captions = [], [], []
        for first in range(0, len(positions), batch_size):
            batch = self.trainer.datamodule.decode(positions[first : first + batch_size])
            valid = batch.valid
            images = batch.images[valid].to(self.device)
            if len(images) == 0:
                continue
            mean, std = self.model.encode_posterior(images)
            latents.append(self.model.sample_latents(mean, std, torch.zeros_like(std)).cpu())
            index.append(batch.sample_index[valid])
            captions += [c for c, ok in zip(batch.captions, valid.tolist(), strict=True) if ok]
        if not index:
            return torch.zeros(0, *self.latent_shape), torch.zeros(0, dtype=torch.long, device=self.device), []
        return torch.cat(latents), torch.cat(index).to(self.device), captions

    def _gather_step(self) -> tuple[Observations, list[Observations]]:
        """The observations of all ranks: the trained rows by place in the global batch, and the reference set's."""
        trained = ranks.gather(self.trainer, self.step_observed, self.trainer.accumulate_grad_batches)
        reference = [] if self.reference_observed is None else [ranks.gather(self.trainer, self.reference_observed, 1)]
        return trained, reference

    # ---- averaged weights, checkpoints

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """The averaged weights in place of the trained ones, where there are any; all ranks enter together."""
        return self.ema.in_place()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["memtrain"] = {
            "exclusion": self.exclusion.state_dict(),
            "scores": self.memory.state_dict() if self.memory else None,
            "updates_skipped": self.updates_skipped,
            "samples_seen": self.samples_seen,
            "samples_bad": self.samples_bad,
            "bad_steps": self.stops.bad_steps,
            "ema": self.ema.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing = sorted(trained - set(checkpoint.get("state_dict", trained)))  # trainer=fsdp took it
        if missing or "memtrain" not in checkpoint:
            lacking = missing[0] if missing else "memtrain's state"
            raise ValueError(f"ckpt_path is not a checkpoint of this model: it lacks {lacking}")
        state = checkpoint["memtrain"]
        self.exclusion.load_state_dict(state["exclusion"])
        if self.memory and state["scores"]:
            self.memory.load_state_dict(state["scores"])
        for name in ("updates_skipped", "samples_seen", "samples_bad"):
            setattr(self, name, state[name])
        self.stops.bad_steps = state["bad_steps"]
        self.ema.load_state_dict(state["ema"])


def _padded(rows: Tensor, batch_size: int) -> Tensor:
    """Row numbers, some said twice, so that their count is one of five shapes: a compiled model sees no more."""
    quarter = -(-batch_size // 4)
    count = -(-len(rows) // quarter) * quarter
    return rows if len(rows) == 0 else torch.cat([rows, rows[:1].expand(count - len(rows))])
