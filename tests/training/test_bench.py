import json

import pytest

from memtrain.cli.bench import bench
from memtrain.training.bench import Interleave, OwnTurns, measure_scoring, variants

NAMES = ["none", "every step", "every 4th visit", "with reference", "iet_agc"]


def test_bench_score_compares_whole_steps_on_the_demo_model(capsys):
    bench(["score", "--models", "demo", "--rounds", "1", "--batch-size", "2", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert list(found["step_seconds"]) == list(found["ratio"]) == NAMES
    assert found["ratio"]["none"] == 1 and min(found["step_seconds"].values()) > 0
    assert found["latents"] == [4, 16, 16] and found["batch_size"] == 2


@pytest.mark.slow
def test_the_other_model_has_stable_diffusions_blocks(monkeypatch):
    one = dict(list(variants().items())[:1])
    monkeypatch.setattr("memtrain.training.bench.variants", lambda: one)
    found = measure_scoring("sd", rounds=1, batch_size=1, steps=1)
    assert found.latents == (4, 32, 32) and found.parameters == pytest.approx(860e6 / 25, rel=0.05)


def test_variants_take_turns_step_by_step():
    interleave = Interleave(rounds=2, steps=2)
    turns = list(interleave._turns)
    assert len(turns) == interleave.num_steps == (2 + 2 * 2) * 5
    measured = turns[10:]
    for name in NAMES:
        assert [number for other, number in measured if other == name] == [0, 0, 1, 1]
    assert [measured[first][0] for first in range(0, 20, 5)] == NAMES[:4]  # each comes first in turn
    assert list(variants()) == NAMES


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be >= 1, got 0"),
        (["--models", "sdxl"], "--models must be one of demo, sd, got sdxl"),
    ],
)
def test_wrong_values_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        bench(["score", *wrong])


def test_the_reference_set_has_a_turn_in_every_round():
    own = OwnTurns()
    due = [own.turn(step) is not None for step in range(14)]
    assert due[0]  # it warms up, and so do the pictures that are encoded once
    assert [sum(due[first : first + 4]) for first in range(2, 14, 4)] == [1, 1, 1]
