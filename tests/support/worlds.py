"""What a rank of a world of gloo ranks does: it trains one job after the other, and writes what came of each to
OUT/JOB-RANK.pt.
"""

from __future__ import annotations

from collections import Counter

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from memtrain.callbacks.export import Export
from memtrain.callbacks.sample_grid import SampleGrid
from memtrain.callbacks.validation import Validation
from memtrain.core.exclusion import Decision, ExclusionRule, FixedThreshold, KeepAll
from memtrain.core.scores import SCORES
from memtrain.training import ranks
from memtrain.training.checkpoint import checkpoint
from memtrain.training.score_memory import Scoring
from memtrain.training.strategy import FullySharded, own_part, whole
from tests.conftest import build_data, build_module
from tests.support.rules import quick_evidence

GLOBAL_BATCH = 8


class KeepFew(ExclusionRule):
    """One sample in eleven: of most ranks nothing, of some steps nothing at all."""

    def decide(self, observed):
        return Decision(observed.sample_index % 11 == 0, torch.zeros_like(observed.score))


RULES = {
    "few": KeepFew,
    "none": KeepAll,
    "fixed": lambda: FixedThreshold(2.0),
    "evidence": quick_evidence,
    "plain": KeepAll,  # and no count is shared: ordinary DDP
}


class Steps(pl.Callback):
    """What a rank kept of each optimizer step."""

    def __init__(self):
        self.alone_with_nothing = 0  # steps of which this rank kept nothing, but another rank did
        self.moved_by_nothing = False  # weights or average changed in a step of which no rank kept anything

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.before = state_here(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            kept, is_skipped = pl_module.last_step.trained.decision.keep_mask, pl_module.accumulation.is_skipped
            self.alone_with_nothing += not kept.any() and not is_skipped
            self.moved_by_nothing |= is_skipped and not torch.equal(state_here(pl_module), self.before)


class Collectives(pl.Callback):
    """Counts what the backend was asked for, DDP's own buckets included, over steps `first` to `last`."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last
        self.asked: Counter = Counter()
        self.sizes: set[int] = set()  # elements of the all-reduces that Python asked for
        self.all_reduce = torch.distributed.all_reduce

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.first:
            torch.distributed.all_reduce = self._sized
            self.profiler = torch.autograd.profiler.profile()
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.last:
            self.profiler.__exit__(None, None, None)
            torch.distributed.all_reduce = self.all_reduce
            names = [event.name() for event in self.profiler.kineto_results.events()]  # its own table takes seconds
            self.asked = Counter(name for name in names if name.startswith("gloo:"))

    def _sized(self, tensor, *args, **kwargs):
        self.sizes.add(tensor.numel())
        return self.all_reduce(tensor, *args, **kwargs)


def train_all(pipeline: str, corpus: str, out: str, jobs: list[dict], world: int) -> None:
    for job in jobs:
        train(pipeline, corpus, out, job, world)


def train(pipeline: str, corpus: str, out: str, job: dict, world: int) -> None:
    steps = Steps()
    counting = Collectives(job["count"][0], job["count"][-1]) if job["count"] else None
    if job["rule"] == "plain":
        ranks.all_reduce = lambda trainer, values: values
    callbacks = [steps, counting] if counting else [steps]
    if job["sharded"] and not job["resume"]:  # they run the networks outside of a step, on one rank or on all
        callbacks += [Validation(3, 3, 2, 0.7, 4), SampleGrid(0, ["fox"], 2, 2, 2.0), Export("float32")]
        callbacks += [checkpoint(3, f"{out}/sharded")]
    scoring = Scoring() if counting else Scoring(kinds=SCORES)
    module = build_module(pipeline, RULES[job["rule"]](), caption_dropout=0.0, reference_batch=4, scoring=scoring)
    before = flat(module.trained_parameters())
    data = build_data(corpus, GLOBAL_BATCH // world // job["accumulate"])
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=(FullySharded if job["sharded"] else DDPStrategy)(process_group_backend="gloo")
        if world > 1
        else "auto",
        max_steps=job["steps"],
        max_epochs=-1,
        accumulate_grad_batches=job["accumulate"],
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=job["sharded"] and not job["resume"],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        default_root_dir=out,
    )
    trainer.fit(module, datamodule=data, ckpt_path=job["resume"], weights_only=True)
    found = dict(
        before=before,
        weights=flat(module.trained_parameters()),
        average=flat(module.ema.shadow_params),
        held=sum(own_part(p).numel() for p in module.trained_parameters()),
        anchored=module.last_step.trained.observed.second_score.sum(),
        seen=module.accumulation.samples_seen,
        skipped=module.accumulation.updates_skipped,
        alone_with_nothing=steps.alone_with_nothing,
        moved_by_nothing=steps.moved_by_nothing,
        asked=dict(counting.asked) if counting else {},
        sizes=sorted(counting.sizes) if counting else [],
    )
    torch.save(found, f"{out}/{job['name']}-{trainer.global_rank}.pt")


def flat(parameters) -> torch.Tensor:
    return torch.cat([whole(p.detach()).flatten() for p in parameters])


def state_here(module) -> torch.Tensor:
    """Weights and their average, what this rank has of them."""
    parameters = [*module.trained_parameters(), *module.ema.shadow_params]
    return torch.cat([own_part(p.detach()).flatten() for p in parameters])
