"""Optimizers of conf/optimizer: exact resumes, evaluation that leaves no trace, what their state takes."""

import sys

import pytest
import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from memtrain.training.checkpoint import checkpoint
from memtrain.training.score_memory import Scoring
from tests.conftest import build_data, build_module, fit, weights
from tests.support.conf import CONF
from tests.support.rules import KeepNothing

CHOICES = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))


def optimizer(name: str, **changed):
    """The choice with the values of its file, at a rate that a few steps show."""
    config = OmegaConf.load(CONF / "optimizer" / f"{name}.yaml")
    base = [one for one in config.pop("defaults") if one == "adamw"]
    values = OmegaConf.merge(*(OmegaConf.load(CONF / "optimizer" / f"{one}.yaml") for one in base), config)
    values.pop("defaults", None)
    rate = {} if name == "prodigy" else {"lr": 1e-3}
    return instantiate(OmegaConf.merge(values, rate, {"warmup_steps": 2}, changed))


class Look(pl.Callback):
    """Looks at the averaged weights after every step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trained = weights(pl_module).clone()
        with pl_module.averaged_weights():
            assert trainer.global_step == 1 or not torch.equal(weights(pl_module), trained)


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "adamw"])  # that one: test_module.py
def test_a_run_that_goes_on_makes_the_steps_of_one_that_was_not_stopped(pipeline_folder, corpus, tmp_path, name):
    """Bit for bit, the one looked at on its way and the other not; and its state is as large as is said."""

    def run(*callbacks, **options):
        module = build_module(pipeline_folder, optimizer=optimizer(name), scoring=Scoring(every=0))
        fit(module, build_data(corpus, 2), tmp_path, 3, callbacks=[*callbacks, checkpoint(2, str(tmp_path))], **options)
        return module

    whole = run(Look())
    rest = run(ckpt_path=str(tmp_path / "step-00000002.ckpt"))
    assert torch.equal(weights(rest), weights(whole))
    ours, theirs = (module.trainer.optimizers[0] for module in (rest, whole))
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    taken = 0
    for own, other in zip(rest.trained_parameters(), whole.trained_parameters(), strict=True):
        assert ours.state[own].keys() == theirs.state[other].keys()
        for key, value in theirs.state[other].items():
            assert torch.equal(torch.as_tensor(ours.state[own][key]), torch.as_tensor(value)), key
            # counts of steps, a mean, and bitsandbytes' tables, are not there for each weight
            taken += 0 if key in ("step", "RMS", "qmap1", "qmap2") else torch.as_tensor(value).nbytes
    said = sum(whole.optimizer_config.state_bytes(parameter.shape) for parameter in whole.trained_parameters())
    assert 0.98 * said < taken <= said  # of weights that are zero Prodigy keeps nothing to begin with


@pytest.mark.parametrize("name", CHOICES)
def test_a_run_that_goes_on_with_other_settings_goes_by_these(pipeline_folder, corpus, tmp_path, name):
    """Not by the checkpoint's, which holds them as state: rate and average as the config says at the next step."""

    def run(steps, ema_decay, **settings):
        chosen = optimizer(name, **settings)
        module = build_module(pipeline_folder, optimizer=chosen, ema_decay=ema_decay, scoring=Scoring(every=0))
        last = tmp_path / "last.ckpt"
        options = {"callbacks": [checkpoint(2, str(tmp_path))], "ckpt_path": str(last) if last.exists() else None}
        fit(module, build_data(corpus, 2), tmp_path, steps, **options)
        [group] = module.trainer.optimizers[0].param_groups
        return module, group

    run(2, 0.9)
    changed = {"weight_decay": 0.5, "lr": 2.0 if name == "prodigy" else 5e-4}
    changed |= {"clip_threshold": 0.25} if name == "adafactor" else {"betas": [0.8, 0.95]}
    module, group = run(4, 0.5, **changed)
    [rate] = {schedule.scheduler.get_last_lr()[0] for schedule in module.trainer.lr_scheduler_configs}
    assert group["lr"] == rate == changed.pop("lr") and group["initial_lr"] == rate
    assert {key: list(value) if key == "betas" else value for key, value in group.items() if key in changed} == changed
    assert module.optimizer_config.averages or module.ema.state_dict()["decay"] == 0.5


def test_the_state_of_another_optimizer_is_refused_in_a_line(pipeline_folder, corpus, tmp_path):
    module = build_module(pipeline_folder, optimizer=optimizer("adamw"), scoring=Scoring(every=0))
    fit(module, build_data(corpus, 2), tmp_path, 1, callbacks=[checkpoint(1, str(tmp_path))])
    other = build_module(pipeline_folder, optimizer=optimizer("adamw8bit"), scoring=Scoring(every=0))
    says = "holds the state of AdamW, which AdamW8bit cannot go on with; choose the optimizer= that"
    with pytest.raises(ValueError, match=says):
        fit(other, build_data(corpus, 2), tmp_path, 2, ckpt_path=str(tmp_path / "last.ckpt"))


def test_schedule_free_is_judged_by_its_average():
    """Against Defazio et al. 2024, algorithm 1, x and z side by side, on a quadratic that is noisy."""
    config, noise = optimizer("schedule_free", lr=0.1, warmup_steps=3), torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    built, schedule = config.build([weight], 20)
    first, second = config.betas
    x = z = weight.detach().clone()
    moment, weighed = torch.zeros_like(x), 0.0
    for step in range(1, 21):
        y = (1 - first) * z + first * x
        torch.testing.assert_close(weight.detach(), y)
        gradient = y - 1 + 0.3 * torch.randn(2, generator=noise, dtype=torch.float64)
        weight.grad = gradient.clone()
        built.step()
        schedule.step()
        moment = second * moment + (1 - second) * gradient**2
        rate = config.lr * min(1.0, step / 3)
        moved = gradient / ((moment / (1 - second**step)).sqrt() + config.eps) + config.weight_decay * y
        z = z - rate * moved
        weighed += rate**2
        x = (1 - rate**2 / weighed) * x + rate**2 / weighed * z
        before = weight.detach().clone()
        with built.averaged():
            torch.testing.assert_close(weight.detach(), x)
        assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ["prodigy", "schedule_free"])
def test_a_step_that_leaves_all_out_counts_for_nothing(pipeline_folder, corpus, tmp_path, name):
    module = build_module(pipeline_folder, KeepNothing(), optimizer=optimizer(name), caption_dropout=0.0)
    before = weights(module).clone()
    fit(module, build_data(corpus), tmp_path, 2)
    [group] = module.trainer.optimizers[0].param_groups
    assert group["k"] == 0 and torch.equal(weights(module), before)


def test_what_an_optimizer_cannot_do_is_refused_in_a_line(pipeline_folder, monkeypatch):
    with pytest.raises(InstantiationException, match=r"optimizer.lr of prodigy multiplies .* say optimizer.lr=1,"):
        optimizer("prodigy", lr=1.5e-3)
    with pytest.raises(InstantiationException, match=r"takes no optimizer.schedule, got cosine; say"):
        optimizer("schedule_free", schedule="cosine")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes.optim", None)
        with pytest.raises(InstantiationException, match=r"adamw8bit needs bitsandbytes: pip install bitsandbytes, or"):
            optimizer("adamw8bit")
    assert [name for name in CHOICES if optimizer(name).shards] == ["adamw"]
    module = build_module(pipeline_folder, optimizer=optimizer("prodigy"))
    module._device_mesh = {"data_parallel": None}
    with pytest.raises(ValueError, match="trainer=fsdp shards optimizer=adamw, and no other"):
        module.configure_model()


def test_adamw_in_one_kernel_makes_the_same_steps_but_for_rounding():
    def stepped(**changed):
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((40, 30), (7,))]
        made = optimizer("adamw", **changed).make(parameters, 5)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            made.step()
        return made.defaults["fused"], torch.cat([parameter.detach().flatten() for parameter in parameters])

    default, fused, loop = stepped(), stepped(fused=True), stepped(fused=False)
    assert not default[0] and fused[0] and torch.equal(default[1], loop[1])  # without a GPU nothing changes
    torch.testing.assert_close(fused[1], loop[1], rtol=0, atol=1e-6)
    with pytest.raises(InstantiationException, match=r"optimizer\.fused=true is not for optimizer=adamw8bit"):
        optimizer("adamw8bit", fused=True)
