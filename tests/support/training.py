"""What tests of a training run watch it by, and what they make happen in it."""

import pytorch_lightning as pl
import torch

from memtrain.training.checkpoint import checkpoint
from memtrain.training.methods import Method
from tests.conftest import build_data, build_module, fit
from tests.support.rules import quick_evidence


class Record(pl.Callback):
    def __init__(self):
        self.observed, self.kept, self.keys, self.window = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.keys.append(batch.sample_index.tolist())
        self.window.append(batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.observed.append(pl_module.last_step.trained.observed)
            self.kept.append(pl_module.last_step.trained.decision.keep_mask)


class Killed(Exception):
    pass


class KillAt(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Killed


class Poison(Method):
    """Of some batches, the first row's embedding is NaN."""

    def __init__(self, calls):
        self.calls, self.call = calls, 0

    def embeddings(self, hidden, captioned, generators):
        self.call += 1
        if self.call in self.calls:
            hidden = hidden.clone()
            hidden[0] = torch.nan
        return hidden


def train(
    pipeline, corpus, folder, steps, accumulate=1, batch_size=4, every=4, callbacks=(), ckpt_path=None, **options
):
    """To `steps`, with a checkpoint every so often in `folder`/checkpoints; the module."""
    module = build_module(pipeline, quick_evidence(), **options)
    callbacks = [*callbacks, checkpoint(every, str(folder / "checkpoints"))]
    fit(module, build_data(corpus, batch_size), folder, steps, accumulate, callbacks=callbacks, ckpt_path=ckpt_path)
    return module
