"""What is remembered of 100 M samples costs a few bytes a sample, on every rank: no temporary of int64 beside it."""

import pytest
import torch

from memtrain.core.exclusion import ExclusionRule
from memtrain.training.score_memory import ScoreMemory, Scoring
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


def test_the_first_visits_that_are_scored_are_spread_evenly():
    wait = ScoreMemory(1001, Scoring(every_visits=7)).wait
    assert torch.equal(wait.long(), torch.arange(1001) % 7) and wait.dtype == torch.uint8
