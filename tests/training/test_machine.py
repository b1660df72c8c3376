"""Ranks of a machine share what is kept of every sample, and all of them see what one process sees."""

import pytest
import torch

from memtrain.training import machine
from memtrain.training.machine import Machine
from tests.support.machines import learn, share


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """Of each of three ranks, on two machines."""
    out = tmp_path_factory.mktemp("machines")
    forks.call(share, out, 3, log=out / "log", ranks=3)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.mark.parametrize("rule", ["evidence", "z_scores", "calibrated"])
def test_every_rank_sees_at_every_step_what_one_process_sees(found, rule):
    alone = learn(rule, Machine())
    assert any(not step["decided"].all() for step in alone)
    for states, *_ in found:
        for state, step in zip(states[rule], alone, strict=True):
            assert state.keys() == step.keys()
            assert all(torch.equal(state[name].nan_to_num(-1), step[name].nan_to_num(-1)) for name in step)


def test_the_memory_is_that_of_the_machine_and_of_no_other(found):
    assert [one.tolist() for _, one, _, _ in found] == [[0, 7, 0], [0, 7, 0], [0, 0, 0]]
    assert [two.tolist() for _, _, two, _ in found] == [[False] * 5] * 3  # mapped from disk
    assert [is_first for *_, is_first in found] == [True, False, True]


def test_no_room_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_IN_MEMORY", tmp_path)
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(OSError, match=r"no room for \d+ bytes that the ranks of this machine share .*TMPDIR"):
        machine._file_of_zeros(1 << 60)
    assert not list(tmp_path.iterdir())
