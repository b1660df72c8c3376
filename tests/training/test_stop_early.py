"""A run that ends with the weights of its lowest held-out loss, cut off on the way or not."""

import pytest
import pytorch_lightning as pl
import torch

from memtrain.callbacks.validation import Validation
from memtrain.training.checkpoint import checkpoint
from memtrain.training.checks import check_stop_early
from memtrain.training.resume import Past, RunState
from memtrain.training.stop_early import StopEarly
from tests.conftest import build_data, build_module, fit, weights
from tests.support.training import KillAt, Killed

SPOILED = 2  # from this step on


class Spoil(pl.Callback):
    """Makes the weights worse, and remembers those of each step and what validation said of them."""

    def __init__(self):
        self.losses, self.weights, self.at_the_end = {}, {}, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= SPOILED:
            with torch.no_grad():
                for parameter in pl_module.trained_parameters():
                    parameter.mul_(1.5)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.global_step] = trainer.callback_metrics["heldout_loss"].item()
        self.weights[trainer.global_step] = weights(pl_module)

    def on_train_end(self, trainer, pl_module):
        with pl_module.averaged_weights():
            self.at_the_end = weights(pl_module)


@pytest.fixture
def train(pipeline_folder, corpus, tmp_path):
    def train(patience, folder="run", steps=20, kill=None, ckpt_path=None):
        spoil, early = Spoil(), StopEarly(patience)
        callbacks = [early, Validation(1, 4, 2, 0.7, 8), spoil, checkpoint(1, str(tmp_path / folder / "checkpoints"))]
        module = build_module(pipeline_folder, ema_decay=0.0)
        rest = {"callbacks": [*callbacks, *([KillAt(kill)] if kill else [])], "ckpt_path": ckpt_path}
        try:
            trainer = fit(module, build_data(corpus), tmp_path / folder, steps, **rest)
        except Killed:
            return None
        return trainer, early, spoil

    return train


def test_a_run_ends_with_its_best_weights_and_so_does_one_that_is_cut_off(train, tmp_path):
    trainer, early, spoil = train(patience=2)
    best = min(spoil.losses, key=spoil.losses.get)
    assert early.step == best <= SPOILED and early.loss == spoil.losses[best]
    assert trainer.global_step == best + 2 and trainer.callback_metrics["heldout_loss"].item() == early.loss
    assert torch.equal(spoil.at_the_end, spoil.weights[best])
    assert not torch.equal(weights(trainer.lightning_module), spoil.at_the_end)  # those that are trained stay
    past = Past(tmp_path / "run", RunState.read(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text("stop_early:\n  patience: 2\n")
    assert past.is_finished(20, patience=2) and past.is_finished(40, patience=1) and past.is_finished(3, patience=9)
    assert not past.is_finished(20, patience=4) and not past.is_finished(20, patience=None)
    # killed after a step in which it waited
    assert train(patience=2, folder="killed", kill=best + 1) is None
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    again, _, spoil_again = train(patience=2, folder="killed", ckpt_path=str(last))
    assert again.global_step == trainer.global_step and torch.equal(spoil_again.at_the_end, spoil.at_the_end)
    # cut off when it had stopped, before it ended
    at_stop = tmp_path / "run" / "checkpoints" / "last.ckpt"
    ended, _, spoil_ended = train(patience=2, folder="ended", ckpt_path=str(at_stop))
    assert ended.global_step == trainer.global_step and torch.equal(spoil_ended.at_the_end, spoil.at_the_end)


def test_a_run_that_stopped_early_goes_on_with_more_patience(train, tmp_path):
    trainer, early, _ = train(patience=2)
    at_stop = tmp_path / "run" / "checkpoints" / "last.ckpt"
    further, still, spoil = train(patience=4, ckpt_path=str(at_stop))
    assert further.global_step == trainer.global_step + 2 and (still.step, still.loss) == (early.step, early.loss)
    whole, _, spoil_whole = train(patience=4, folder="whole")
    assert whole.global_step == further.global_step and torch.equal(spoil.at_the_end, spoil_whole.at_the_end)


def test_a_run_that_is_not_stopped_ends_with_its_best_weights_too(train):
    trainer, early, spoil = train(patience=9, steps=4)
    assert trainer.global_step == 4 and torch.equal(spoil.at_the_end, spoil.weights[early.step])


def test_a_run_whose_patience_was_taken_back_ends_with_its_last_weights(pipeline_folder):
    module, early = build_module(pipeline_folder), StopEarly(None)
    early.load_state_dict({"loss": 0.5, "step": 3, "waited": 1, "weights": [torch.zeros(1)]})
    early.on_train_end(None, module)
    assert module.final_weights is None


def test_patience_that_makes_no_sense_is_named():
    with pytest.raises(ValueError, match=r"stop_early\.patience must be >= 1 validation, got 0"):
        StopEarly(0)
    with pytest.raises(ValueError, match=r"stop_early\.patience=3 goes by the held-out loss.*reference\.count"):
        check_stop_early(3, 0, validates=True)
