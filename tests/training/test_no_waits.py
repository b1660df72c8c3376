"""A step on a device: where the host waits for it."""

from types import SimpleNamespace

import pytest
import torch

from memtrain.training.score_memory import ScoreMemory, Scoring
from tests.conftest import build_data, build_module
from tests.support.no_float64 import DEVICE
from tests.support.no_waits import NoWaits
from tests.support.rules import quick_rules

DECIDED = 'ranks.py: return observed if observed.score.device.type == "cpu" else unpack(pack(observed).cpu(), observed)'
SETTLED = "accumulation.py: sums = ranks.all_reduce(trainer, torch.cat([counts, reported])).tolist()"


def step(folder, corpus, exclusion, scoring=None, steps=2, **options):
    """The gradients of the second of two steps on a device, and where the host waited for it."""
    module, data = build_module(folder, exclusion, scoring=scoring or Scoring(), **options), build_data(corpus)
    module.exclusion.setup(data.groups.num_samples, module.num_timesteps)
    if module.scoring.remembers:
        module.memory = ScoreMemory(data.groups.num_samples, module.scoring)
    module.log_dict = lambda *_, **__: None  # Lightning's, which reads nothing before somebody looks at the bar
    plugin = SimpleNamespace()
    data.trainer = module._trainer = SimpleNamespace(
        datamodule=data, global_step=0, world_size=1, accumulate_grad_batches=1, precision_plugin=plugin
    )
    waits = []
    with NoWaits() as device:
        process = module.model.noise_process
        process._buffers = {name: buffer.to(DEVICE) for name, buffer in process._buffers.items()}
        for number in range(steps):
            module.zero_grad()
            module._trainer.global_step = number
            batch = data.collate(data.views)([(number, place, 5 * place + number) for place in range(4)])
            device.waits.clear()
            module.training_step(batch.to(DEVICE), number).backward()
            waits = list(device.waits)
            module.accumulation.settle(module._trainer, module.trained_parameters())
            assert device.waits[len(waits) :] == [SETTLED]  # one small copy tells all that the host must know
            observed, _ = module.accumulation.take()
            assert observed.score.device == observed.loss.device == DEVICE
            if module.memory:
                module.memory.update(observed)
    return [parameter.grad for parameter in module.trained_parameters()], waits


@pytest.mark.parametrize(
    ("rule", "scoring"),
    [("fixed", Scoring()), ("fixed", Scoring(every_visits=2)), ("none", Scoring(every=0))],
)
def test_forward_score_decision_and_backward_wait_for_nothing(rule, scoring, pipeline_folder, corpus):
    gradients, waits = step(pipeline_folder, corpus, quick_rules().get(rule), scoring)
    assert waits == []
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_rule_that_remembers_waits_once_to_decide(pipeline_folder, corpus):
    _, waits = step(pipeline_folder, corpus, quick_rules()["evidence"], steps=1)
    assert waits == [DECIDED]


def test_the_mode_sees_waits():
    with NoWaits() as device:
        there = torch.arange(4.0).to(DEVICE, non_blocking=True)
        assert device.waits == []
        mask = there > 1
        reads = [lambda: there.tolist(), lambda: bool(mask.any()), lambda: there[mask], lambda: there.cpu()]
        for wait in [*reads, lambda: there.nonzero(), lambda: torch.ones(2).to(DEVICE), lambda: there.sum().item()]:
            device.waits.clear()
            wait()
            assert len(device.waits) == 1
