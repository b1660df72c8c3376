"""The LightningModule: what happens to a batch, in order.

predict and score (predictor.py) -> exclude -> loss -> one optimizer step out of micro-batches and ranks
(accumulation.py) -> score the reference set (reference.py) -> the rule learns
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from memtrain.core import losses
from memtrain.core.exclusion import PULL, SACRIFICED, Decision, ExclusionRule, Observations
from memtrain.core.scores import ANCHORED, MAGNITUDE
from memtrain.core.streams import Stream
from memtrain.data.batches import Batch
from memtrain.data.datamodule import data_of
from memtrain.data.latents import LatentCache
from memtrain.data.remote import ShardMissing
from memtrain.models.adapters import Adapter
from memtrain.models.base import DiffusionModel, trained_parameters
from memtrain.training import ranks, strategy
from memtrain.training.accumulation import Accumulation
from memtrain.training.average import AveragedWeights
from memtrain.training.checks import check_base, check_optimizer, check_rule_score
from memtrain.training.encoded import EncodedSamples, encode_pictures, encode_samples
from memtrain.training.latent_cache import with_foreign_latents
from memtrain.training.machine import Keeper, Machine
from memtrain.training.methods import Method
from memtrain.training.objective import Objective
from memtrain.training.optimizers import OptimizerConfig
from memtrain.training.predictor import Predictor, Visit
from memtrain.training.reference import ReferenceSet, say_unscored
from memtrain.training.schedule_free import ScheduleFreeAdamW
from memtrain.training.score_memory import ScoreMemory, Scoring
from memtrain.training.step_record import DecidedRows, StepRecord
from memtrain.training.stops import Stops

log = logging.getLogger(__name__)
T = TypeVar("T")

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
        objective: how captions, noise and losses are weighed.
        scoring: how visits are scored, and which of them.
        reference_every: score reference samples after every k-th step.
        reference_batch: how many of them, over all ranks; None: half the global batch, if the rule needs them.
        ema_decay: of the averaged weights, with warm-up; 0 keeps no average, and neither does an optimizer that has one
            of its own.
        max_bad_steps: so many steps in a row whose loss or gradient is not finite end the run; fewer are skipped.
        adapter: what is trained in place of the model's own weights; None: these.
    """

    def __init__(
        self,
        model: DiffusionModel,
        exclusion: ExclusionRule,
        optimizer: OptimizerConfig,
        method: Method,
        *,
        seed: int,
        resolution: int,
        objective: Objective,
        scoring: Scoring,
        reference_every: int,
        reference_batch: int | None,
        ema_decay: float,
        max_bad_steps: int = 10,
        adapter: Adapter | None = None,
    ):
        super().__init__()
        if scoring.every == 0 and exclusion.needs_score:
            rule = type(exclusion).__name__
            raise ValueError(f"score.every=0 (never) is for rules that need no score, and {rule} does; set it to 1")
        last = model.noise_process.num_timesteps
        if scoring.timesteps is not None and scoring.timesteps[1] > last:
            raise ValueError(f"score.timesteps ends at {last} at most, got {scoring.timesteps[1]}")
        self.model, self.exclusion, self.optimizer_config = model, exclusion, optimizer
        self.adapter = adapter or Adapter()
        self.adapter.check_quantization(model.quantization)
        self.adapter.attach(model, seed)
        # before a checkpoint is loaded: a run that goes on compares with what it began with
        self.anchor = self.adapter.anchor(model) if ANCHORED in scoring.kinds else None
        self.seed = seed
        self.latent_shape = model.latent_shape(resolution, resolution)
        self.objective, self.scoring = objective, scoring
        self.predictor = Predictor(model, method, objective, seed, scoring, self.anchor)
        self.memory: ScoreMemory | None = None
        self.machine = Machine()  # until `setup` has ranks
        self.reference = ReferenceSet(reference_every, reference_batch)
        self.ema = AveragedWeights(0.0 if optimizer.averages else ema_decay)
        self.stops = Stops(max_bad_steps)
        self.accumulation = Accumulation(objective.denominator, self.stops)
        self.last_step: StepRecord | None = None  # the newest that is over; for those who look on
        self.final_weights: list[Tensor] | None = None  # what the run ends with, in place of the average
        self.strict_loading = False  # checkpoints hold trained weights alone

    # ---- set-up

    @property
    def num_timesteps(self) -> int:
        return self.predictor.num_timesteps

    @property
    def reference_size(self) -> int:
        """How many reference rows a turn scores, over all ranks; 0: the reference set is not scored."""
        if self.scoring.every == 0:
            return 0
        return self.reference.size(data_of(self.trainer), self.exclusion.needs_reference)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The weights that are trained, in the order in which optimizer and average hold them."""
        return trained_parameters(self.model)

    def setup(self, stage: str) -> None:
        if self.trainer.precision not in FROZEN_DTYPES:
            raise ValueError(
                f"trainer.precision must be one of {', '.join(FROZEN_DTYPES)}, got {self.trainer.precision}"
            )
        self.model.prepare_frozen(FROZEN_DTYPES[self.trainer.precision])
        self.adapter.prepare_frozen(FROZEN_DTYPES[self.trainer.precision])
        for size in data_of(self.trainer).samples.sizes:
            self.model.latent_shape(*size)  # raises where the model cannot have it
        num_samples = data_of(self.trainer).groups.num_samples
        self.machine = Machine(self.trainer.global_rank, self.trainer.world_size, self.trainer.node_rank)
        self.exclusion.zeros = self.machine.zeros  # type: ignore[method-assign]
        self.exclusion.setup(num_samples, self.num_timesteps)
        if self.scoring.remembers:
            self.memory = ScoreMemory(num_samples, self.scoring, self.machine.zeros)

    def configure_model(self) -> None:
        """Shard what is trained where the strategy has a mesh for it (trainer=fsdp); begin the average."""
        bones = {}
        if self.device_mesh is not None:
            if self.memory:
                raise ValueError("trainer=fsdp scores every row or none; set score.every_visits=1 score.timesteps=null")
            if not self.optimizer_config.shards:
                raise ValueError("trainer=fsdp shards optimizer=adamw, and no other; use that one, or trainer=ddp")
            if self.model.quantization is not None:
                raise ValueError(
                    f"trainer=fsdp does not shard model.quantization={self.model.quantization}; leave it out, or use "
                    "trainer=ddp"
                )
            bones = strategy.shard_trained(self.model, self.device_mesh["data_parallel"])
        self.ema.begin(self.model, bones)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer, schedule = self.optimizer_config.build(self.trained_parameters(), self.trainer.max_steps)
        self._settings = self.optimizer_config.settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        data = data_of(self.trainer)
        if data.groups.num_foreign and isinstance(data.cache, LatentCache):  # before its loader is made
            data.cache = with_foreign_latents(self.model, data)
        self.ema.to(self.device)
        if self.anchor is not None:
            log.info("the anchored score compares with the weights that the run began with: %s", self.anchor.cost())
        if self.scoring.every and self.reference_size == 0:
            say_unscored(len(data_of(self.trainer).groups.reference))

    def on_train_start(self) -> None:
        [optimizer], [schedule] = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        assert isinstance(schedule.scheduler, LambdaLR)  # as `OptimizerConfig.build` makes it
        self.optimizer_config.take_up(optimizer, schedule.scheduler, self._settings)

    # ---- one micro-batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of a micro-batch's kept losses; what it is divided by is settled when the step is whole."""
        data_of(self.trainer).report(batch)
        self.stops.missing = self.stops.missing or batch.missing
        visit = self.predictor.visit(batch, self.global_step, Stream.TRAIN, self._due)
        loss, observed = visit.found.loss, visit.observed
        if self.memory:
            observed = self.memory.fill(observed, batch.on_host.picture)
        decision = self._decide(observed, batch.valid)
        self.accumulation.add(observed, decision, batch.valid)
        self._log_progress(observed, decision, batch.valid)
        taught = decision.keep_mask
        if self.exclusion.action == PULL:
            pulled = ~taught & batch.valid
            if decision.pull_mask is not None:
                pulled &= decision.pull_mask
            loss, taught = self._pulled(visit, pulled), taught | pulled
        return losses.masked_sum(loss, self.objective.weights(observed.timesteps, self.model), taught)

    def _pulled(self, visit: Visit, pulled: Tensor) -> Tensor:
        """The losses of B rows; where a row is pulled, the distance to what is predicted without its caption. (B,)"""
        loss = visit.found.loss
        # sharded weights are gathered by all ranks together, so that each has the forward pass of all of its rows
        rows = (pulled | (self.device_mesh is not None)).nonzero()[:, 0]
        if len(rows):
            loss = torch.where(pulled, loss.index_copy(0, rows, self.predictor.pull(visit, rows)), loss)
        return loss

    def _due(self, picture: Tensor, timesteps: Tensor, has_caption: Tensor) -> Tensor | None:
        """Say which of B rows are scored now: (B,) bool on the CPU; None: all, without a look at the data."""
        if self.scoring.every == 0 or self.global_step % self.scoring.every:
            return torch.zeros_like(has_caption)
        return self.memory.due(picture, timesteps) & has_caption if self.memory else None

    def _decide(self, observed: Observations, valid: Tensor) -> Decision:
        """Ask the rule about B rows; what says nothing is kept, what cannot be decoded is not trained on."""
        # a rule that learns decides on the CPU, where its memory is
        seen = ranks.on_host(observed) if self.exclusion.learns else observed
        decision = self.exclusion.decide(seen).to(observed.score.device)
        free = observed.group == SACRIFICED
        if not self.exclusion.remembers:
            free = free | ~(observed.known if self.exclusion.needs_score else observed.captioned)
        if self.global_step < self.exclusion.start_step:
            free = torch.ones_like(free)
        return replace(decision, keep_mask=(decision.keep_mask | free) & valid)

    def _log_progress(self, observed: Observations, decision: Decision, valid: Tensor) -> None:
        """Give the progress bar the micro-batch's means over its rows, B of them, that could be decoded."""
        rows = valid.sum().clamp(min=1)
        self.log_dict(
            {
                "loss": torch.where(valid, observed.loss, 0.0).sum() / rows,
                "score": observed.score.sum() / observed.known.sum().clamp(min=1),
                "excluded": (valid & ~decision.keep_mask).sum() / rows,
            },
            prog_bar=True,
            logger=False,
            batch_size=len(valid),
        )

    # ---- one optimizer step: all ranks, all micro-batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Settle what the gradient is divided by: before it is clipped, and after fp16 gradients are unscaled."""
        self.accumulation.settle(self.trainer, self.trained_parameters())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update weights and average, leave a record of the step, and have rule and memory learn from it."""
        super().optimizer_step(*args, **kwargs)
        [optimizer] = self.trainer.optimizers
        optimizer.zero_grad()  # here, and not at the next backward: whatever comes between has its memory
        if not self.accumulation.is_skipped:
            self.ema.step()
        observed, decision = self.accumulation.take()
        self.last_step = StepRecord(self.global_step, DecidedRows(observed, decision), self._decide_reference())
        if (self.exclusion.learns or self.memory) and not self.accumulation.step_is_bad:
            self._learn(self.last_step)
        self.accumulation.mid_step = False

    def _decide_reference(self) -> DecidedRows | None:
        """Score the reference rows whose turn it is, and ask the rule whether it would exclude them; None: nobody's."""
        seen = self.reference.observe(self.trainer, self.predictor, self.global_step, self.reference_size)
        self.stops.missing = self.stops.missing or self.reference.missing
        if seen is None:
            return None
        observed, valid = seen
        return DecidedRows(observed, self._decide(observed, valid))

    def _learn(self, record: StepRecord) -> None:
        """Show memory and rule all ranks' rows, by their place in the global batch, the reference set's after them."""
        gathered = ranks.gather(self.trainer, record.trained.observed, self.trainer.accumulate_grad_batches)
        trained = ranks.on_host(gathered)  # where memory and rule are
        parts = [trained]
        if record.reference is not None:
            parts.append(ranks.on_host(ranks.gather(self.trainer, record.reference.observed, 1)))
        observed = Observations.concatenate(parts)
        keepers: list[Keeper] = [self.exclusion, self.memory] if self.memory else [self.exclusion]
        with self.machine.changing(keepers, observed.picture) as pictures:
            if self.memory:
                self.memory.update(replace(trained, picture=pictures[: len(trained.picture)]))
            if self.exclusion.learns:
                self.exclusion.update(replace(observed, picture=pictures))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stop the run where it is to: here the callbacks, the checkpoint last, are done with the step."""
        if self.stops.reason is not None:
            raise self.stops.reason

    # ---- for those who look on

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """Write what was trained as files for diffusers: a whole pipeline, or an adapter."""
        self.adapter.export(self.model, folder, dtype)

    def encode_samples(self, positions: Sequence[int]) -> EncodedSamples:
        """Encode the samples at these positions, but those that cannot be read, with the frozen VAE.

        All ranks call it together. Raises ShardMissing on all where a shard is gone for any.
        """
        return self._read_together(lambda: encode_samples(self.model, data_of(self.trainer), positions))

    def encode_pictures(self, positions: Sequence[int]) -> tuple[Tensor, np.ndarray]:
        """The same of their latents alone, see `memtrain.training.encoded`; each rank for positions of its own."""
        return self._read_together(lambda: encode_pictures(self.model, data_of(self.trainer), positions))

    def _read_together(self, read: Callable[[], T]) -> T:
        """What `read` gives on this rank; where a shard is gone for any, all raise."""
        found = None
        try:
            found = read()
        except ShardMissing as error:
            self.stops.missing = str(error)
        gone = torch.tensor(float(self.stops.missing is not None), device=self.device)
        self.stops.break_off(self.trainer, ranks.all_reduce(self.trainer, gone).item())
        assert found is not None  # or a shard were gone
        return found

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Put the averaged weights in the place of the trained ones for a while; all ranks enter together.

        At the end of a run that keeps its best weights (`stop_early`) they are these.
        """
        [optimizer] = self.trainer.optimizers
        if isinstance(optimizer, ScheduleFreeAdamW) and self.final_weights is None:
            return optimizer.averaged()
        return self.ema.in_place(self.final_weights)

    def copies_of_averaged_weights(self) -> list[Tensor]:
        """The averaged weights on the CPU, whole, in the order of `trained_parameters`; all ranks call it together."""
        [optimizer] = self.trainer.optimizers
        if isinstance(optimizer, ScheduleFreeAdamW):
            with optimizer.averaged():
                return [weight.detach().to("cpu", copy=True) for weight in self.trained_parameters()]
        return [strategy.whole(weight).detach().to("cpu", copy=True) for weight in self.ema.shadow_params]

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["memtrain"] = {
            "exclusion": self.exclusion.state_dict(),
            "scores": self.memory.state_dict() if self.memory else None,
            "ema": self.ema.state_dict(),
            "base": self._base,
            "rule_score": self.scoring.rule,
            "optimizer": self.optimizer_config.kind,
            **self.accumulation.state_dict(),
        }

    @property
    def _base(self) -> dict[str, str]:
        """A hash of the weights of each network that a run must begin with to go on with this one's checkpoints."""
        return {**self.adapter.base, **(self.anchor.fingerprint if self.anchor else {})}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing = sorted(trained - set(checkpoint.get("state_dict", trained)))  # trainer=fsdp took it
        if missing or "memtrain" not in checkpoint:
            lacking = missing[0] if missing else "memtrain's state"
            raise ValueError(f"ckpt_path is not a checkpoint of this model: it lacks {lacking}")
        state = checkpoint["memtrain"]
        check_base(state.get("base", {}), self._base, is_adapter=bool(self.adapter.base))
        check_optimizer(state.get("optimizer"), self.optimizer_config)
        if self.exclusion.needs_score:
            check_rule_score(state.get("rule_score", MAGNITUDE), self.scoring)
        self.exclusion.load_state_dict(state["exclusion"])
        if self.memory and state["scores"]:
            self.memory.load_state_dict(state["scores"])
        self.accumulation.load_state_dict(state)
        self.ema.load_state_dict(state["ema"])
