"""What an accelerator without float64, as Apple's, is asked for: nothing in float64."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from memtrain.callbacks.curves import MemorizationCurves
from memtrain.callbacks.memorized_table import MemorizedTable
from memtrain.core.exclusion import REFERENCE, TRAINED, Decision, Observations
from memtrain.core.quantiles import RunningQuantiles
from memtrain.core.statistics import BinnedMoments, auc, tpr_at_fpr
from memtrain.core.trend import Trend
from memtrain.training import ranks
from memtrain.training.score_memory import ScoreMemory, Scoring
from memtrain.training.step_record import DecidedRows, StepRecord
from tests.support.no_float64 import DEVICE, NoFloat64
from tests.support.observe import observe
from tests.support.rules import quick_rules


def some(group: int, device) -> Observations:
    """32 visits, on the device."""
    generator = torch.Generator().manual_seed(group)
    score = torch.rand(32, generator=generator) + 0.1
    timesteps = torch.randint(1000, (32,), generator=generator)
    return moved(observe(score, timesteps, group=group, loss=torch.rand(32, generator=generator) + 0.1), device)


def moved(observed: Observations, device) -> Observations:
    return replace(observed, **{f.name: getattr(observed, f.name).to(device) for f in fields(Observations)})


def test_the_device_of_these_tests_has_no_float64_and_is_not_the_cpu():
    with NoFloat64():
        there = torch.arange(3.0).to(DEVICE)
        assert there.device == (there + 1).device == torch.ones(2, device=DEVICE).device == DEVICE
        assert there.cpu().double().device.type == "cpu"
        for asked in (Tensor.double, lambda x: x.to(torch.float64), lambda x: x.sum(dtype=torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                asked(there)


@pytest.mark.parametrize("name", quick_rules())
def test_rules_decide_and_learn_as_on_the_cpu(name):
    with NoFloat64():
        states = []
        for device in (torch.device("cpu"), DEVICE):
            rule = quick_rules()[name]
            rule.setup(32, 1000)
            for _ in range(3):
                trained, reference = some(TRAINED, device), some(REFERENCE, device)
                decision = rule.decide(trained)
                assert decision.keep_mask.device == decision.threshold.device == device
                rule.update(Observations.concatenate([trained, reference]))
            states.append([*rule.state_dict().values(), decision.keep_mask.cpu(), decision.threshold.cpu()])
    assert all(torch.equal(here, there) for here, there in zip(*states, strict=True))


def test_statistics_are_those_of_the_cpu():
    values, bins = torch.rand(40, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    with NoFloat64():
        found = []
        for device in ("cpu", DEVICE):
            x, b = values.to(device), bins.to(device)
            quantiles, moments, trend = RunningQuantiles(4, 0, 1, 0.1, 10), BinnedMoments(4, 10), Trend(2, 10)
            quantiles.update(x, b)
            moments.update(x, b)
            trend.update(x, b / 4)
            told = torch.tensor([auc(x[:20], x[20:]), tpr_at_fpr(x[:20], x[20:], 0.2)])
            found.append([quantiles.counts, moments.sums, trend.sums, trend.at(b / 4), told])
    assert all(torch.equal(here, there) for here, there in zip(*found, strict=True))


def test_score_memory_curves_and_table_look_on():
    trainer = SimpleNamespace(
        world_size=1, is_global_zero=True, global_step=0, max_steps=4, loggers=[], callback_metrics={},
        optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])],
        datamodule=SimpleNamespace(groups=SimpleNamespace(reference=[1])),
    )  # fmt: skip
    with NoFloat64():
        points = []
        for device in ("cpu", DEVICE):
            kept, threshold = torch.ones(32, dtype=torch.bool).to(device), torch.ones(32).to(device)
            trained = DecidedRows(some(TRAINED, device), Decision(kept, threshold))
            module = SimpleNamespace(
                num_timesteps=1000, device=device, last_step=StepRecord(0, trained, None),
                predictor=SimpleNamespace(scoring_time=SimpleNamespace(take=lambda: 0.0)), reference_size=4,
                scoring=Scoring(),
                accumulation=SimpleNamespace(samples_seen=32, updates_skipped=0),
            )  # fmt: skip
            curves, memory = MemorizationCurves(every=9, high_noise=0.5), ScoreMemory(32, Scoring(every_visits=2))
            table = MemorizedTable(0, 4, 2, 0.3, 2, 2.0, 0.5, 8)
            for callback in (curves, table):
                callback.on_train_start(trainer, module)
            trainer.lightning_module = module
            curves.on_train_batch_start(trainer, module, None, 0)
            for callback in (curves, table):
                callback.after_step(trainer, module)
            curves._log(trainer, module)
            table._add(trainer, module)
            memory.update(memory.fill(trained.observed))
            points.append([curves.total, torch.from_numpy(table.visited.sums), memory.score])
    assert all(torch.equal(here, there) for here, there in zip(*points, strict=True))
    assert points[0][0].sum() > 0


def test_what_ranks_tell_each_other_is_exact():
    rows = some(TRAINED, "cpu")
    odd = torch.tensor([torch.nan, torch.inf, -0.0, 1e-45, 0.1, 3.4e38])
    rows = replace(rows, score=odd.repeat(6)[:32], sample_index=torch.arange(32) + 2**53 - 40)
    rows.captioned[::3] = False
    with NoFloat64():
        packed = ranks.pack(moved(rows, DEVICE))
        assert packed.device == DEVICE and packed.dtype == torch.uint8 and len(packed) == 32
        again = ranks.unpack(packed.flip(0), moved(rows, DEVICE))
    for field in fields(Observations):
        sent, came = getattr(rows, field.name), getattr(again, field.name).cpu().flip(0)
        assert came.dtype == sent.dtype and torch.equal(came.view(torch.uint8), sent.view(torch.uint8)), field.name
