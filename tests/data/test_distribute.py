"""Tasks shared by workers: each is done once, whoever dies; what cannot be done is named and left."""

import logging
from functools import partial
from pathlib import Path

import pytest

from memtrain.data import crews
from memtrain.data.distribute import Local, Part
from tests.support.tasks import do, do_prepared, prepare, tries


def tasks(folder: Path, **said: str) -> list[tuple[str, str]]:
    """Eight, of which some have something said of them: `t3="kill once"`."""
    return [(said.get(f"t{number}", "do"), str(folder / f"t{number}")) for number in range(8)]


def test_a_worker_that_is_killed_loses_nothing_and_what_always_kills_is_named_and_left(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(crews, "TRIES", 2)
    given = tasks(tmp_path, t1="kill", t4="fail once", t6="fail")
    with caplog.at_level(logging.WARNING):
        done = list(
            Local(2).run(do_prepared, given, partial(prepare, str(tmp_path)), name=lambda task: Path(task[1]).name)
        )
    assert sorted(one.index for one in done) == list(range(8))
    by_index = {one.index: one for one in done}
    assert {n for n, one in by_index.items() if one.failure} == {1, 6}
    assert all(one.result[0] == f"t{n}" for n, one in by_index.items() if one.result)
    assert "SIGKILL" in by_index[1].failure and "no luck with t6" in by_index[6].failure
    assert [tries(path) for _, path in given] == [1, 2, 1, 1, 2, 1, 2, 1]
    assert "t1: its worker was killed" in caplog.text and "t1 is left after 2 tries" in caplog.text
    # two workers, and at most one more for each that was killed: prepared once each
    assert len(list(tmp_path.glob("prepared.*"))) <= 2 + 2


@pytest.mark.parametrize(
    ("workers", "what", "error"), [(1, "refuse", ValueError), (1, "fill", OSError), (2, "fill", OSError)]
)
def test_what_another_try_would_meet_too_ends_it_all(tmp_path, workers, what, error):
    with pytest.raises(error, match="t2"):
        list(Local(workers).run(do, tasks(tmp_path, t2=what)))
    assert tries(str(tmp_path / "t2")) == 1


def test_one_worker_is_this_process_and_tries_again(tmp_path):
    done = list(Local(1).run(do, tasks(tmp_path, t0="fail", t5="fail once")))
    assert [one.index for one in done] == list(range(8))
    assert "no luck" in done[0].failure and done[5].result[0] == "t5"


def test_parts_together_are_all_tasks_once():
    assert sorted(place for n in range(1, 6) for place in Part.parse(f"{n}/5").of(17)) == list(range(17))
    for said in ("0/4", "5/4", "3", "a/b", "1/0"):
        with pytest.raises(ValueError, match="part="):
            Part.parse(said)
