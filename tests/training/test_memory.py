"""What is remembered of 100 M samples costs a few bytes a sample, on every rank: no temporary of int64 beside it."""

import pytest
import torch

from memtrain.core.exclusion import ExclusionRule
from memtrain.training.average import AveragedWeights
from memtrain.training.checkpoint import AsideIO
from memtrain.training.score_memory import ScoreMemory, Scoring
from tests.conftest import build_module
from tests.support.allocations import Allocations
from tests.support.rules import quick_rules

SAMPLES = 100_003


RULES = quick_rules()


def set_up(rule: ExclusionRule) -> ExclusionRule:
    rule.setup(SAMPLES, 1000)
    return rule


@pytest.mark.parametrize(
    ("make", "cost"),
    [
        (lambda: ScoreMemory(SAMPLES, Scoring(every_visits=4)), 7),
        (lambda: ScoreMemory(SAMPLES, Scoring(every_visits=255)), 7),
        (lambda: set_up(RULES["evidence"]), 8),
        (lambda: set_up(RULES["z_scores"]), 5),
    ],
)
def test_what_is_remembered_of_samples_is_made_and_loaded_without_temporaries(make, cost):
    with Allocations() as made:
        remembered = make()
    assert cost * SAMPLES <= made.bytes < cost * SAMPLES + 10_000
    state = {name: torch.ones_like(tensor) for name, tensor in remembered.state_dict().items()}
    with Allocations() as loaded:
        remembered.load_state_dict(state)
    assert loaded.bytes < 10_000
    for name, tensor in remembered.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.untyped_storage().data_ptr() != state[name].untyped_storage().data_ptr()
        assert tensor.untyped_storage().nbytes() <= tensor.nbytes + 255  # a checkpoint holds storages whole


@pytest.mark.parametrize("name", RULES)
def test_a_rule_names_all_that_it_keeps_of_every_sample(name):
    """What it names is shared by the ranks of a machine, and looked up there by other numbers while it learns."""
    rule = set_up(RULES[name])
    kept = {name for name, value in vars(rule).items() if isinstance(value, torch.Tensor) and len(value) == SAMPLES}
    assert kept == set(rule.per_sample)
    assert not any(getattr(rule, name).any() for name in kept)


def test_the_first_visits_that_are_scored_are_spread_evenly():
    wait = ScoreMemory(1001, Scoring(every_visits=7)).wait
    assert torch.equal(wait.long(), torch.arange(1001) % 7) and wait.dtype == torch.uint8


def test_the_average_is_put_in_place_exported_and_restored_without_a_second_copy(pipeline_folder, tmp_path):
    model = build_module(pipeline_folder).model
    model.vae.to(memory_format=torch.contiguous_format)  # as files have it; small beside the network, it is copied
    trained = list(model.unet.parameters())
    own = [parameter.data_ptr() for parameter in trained]
    size = sum(parameter.nbytes for parameter in trained)
    ema = AveragedWeights(0.9)
    ema.begin(model, {})
    for tensor in ema.shadow_params:
        tensor.add_(1.0)
    with Allocations() as made, ema.in_place():
        assert [p.data_ptr() for p in trained] == [tensor.data_ptr() for tensor in ema.shadow_params]
        model.export(tmp_path / "export", torch.float32)
    assert [parameter.data_ptr() for parameter in trained] == own and made.bytes < size / 2
    again = build_module(tmp_path / "export").model
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), ema.shadow_params, strict=True))

    state = {"state_dict": {}, "memtrain": {"ema": ema.state_dict()}, "other": [torch.ones(3)]}
    AsideIO().save_checkpoint(state, tmp_path / "one.ckpt")
    with Allocations() as loaded:
        checkpoint = AsideIO().load_checkpoint(tmp_path / "one.ckpt", weights_only=True)
        for tensor in ema.shadow_params:
            tensor.zero_()
        ema.load_state_dict(checkpoint["memtrain"]["ema"])
    (tmp_path / "one.ckpt").unlink()  # what is held on to is not left in it
    assert torch.equal(checkpoint["other"][0], torch.ones(3)) and loaded.bytes < 1.5 * size  # the file, mapped
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), ema.shadow_params, strict=True))
