"""A search: what it tries, counts, gives up, refuses and says."""

import os
import re
import sqlite3
import threading
import time
from pathlib import Path

import optuna
import pytest

from memtrain.sweep.pruning import MedianRule, Objectives
from memtrain.sweep.standing import tried
from memtrain.sweep.trial import spoken
from tests.support.forks import wait_until
from tests.support.searches import QUICK, search, states


def test_a_search_counts_what_earlier_starts_finished(tmp_path):
    search(tmp_path).run(2, workers=1)
    again = search(tmp_path)
    again.run(3, workers=2)
    assert states(again) == ["COMPLETE"] * 3
    for trial in again.study.get_trials():
        assert sum(trial.values) == pytest.approx(1)
        assert trial.user_attrs["overrides"] == [f"x={trial.params['x']:.4g}"]
        assert len(trial.user_attrs["curve"]) == 3
    other = search(tmp_path / "other")
    other.run(3, workers=1)  # what is tried depends on the seed and the trial's number alone while it is at random
    ours, theirs = ([trial.params for trial in one.study.get_trials()][:2] for one in (again, other))
    assert ours == theirs


def test_it_says_how_far_it_is(tmp_path, caplog):
    caplog.set_level("INFO", logger="memtrain.sweep")
    one = search(tmp_path)
    one.run(2, workers=1)
    one.run(1, workers=1)
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"{tmp_path}/runs/s: 0 of 2 trials done. What a trial prints is in its trial.log"
    best = min(tried(one.study), key=lambda run: run.quality)
    assert re.fullmatch(r"trial_000: copy_rate/canary 0\.\d{3}, heldout_loss 0\.\d{4}, in \d s", said[2])
    assert re.match(r"1 of 2 trials done, about \d s left; best so far trial_000: x=", said[3])
    assert said[6] == f"2 of 2 trials done; best so far {best.name}: {best.setting}"
    assert said[7].startswith(f"{tmp_path}/runs/s: 2 of 1 trials done; best so far {best.name}")


@pytest.mark.parametrize(("seconds", "says"), [(4, "4 s"), (240, "4 min"), (9000, "2.5 h")])
def test_times_as_they_are_spoken(seconds, says):
    assert spoken(seconds) == says


def sweep_when_told(folder: str) -> None:
    Path(folder, f"ready-{os.getpid()}").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.001)
    search(Path(folder), "pause=0.1").run(4, workers=1)


@pytest.mark.slow
def test_sweeps_that_start_at_once_share_a_study(forks, tmp_path):
    """One of them makes the tables, and no trial is done twice or too often."""
    (tmp_path / "quick.py").write_text(QUICK)
    forks.start([str(tmp_path)], tmp_path / "log", ranks=2, function=sweep_when_told)
    forks.wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    (tmp_path / "go").touch()
    assert forks.wait() == [0, 0], forks.said()
    assert states(search(tmp_path, "pause=0.1")) == ["COMPLETE"] * 4
    assert all((tmp_path / f"runs/s/trial_00{n}/steps").read_text() == "123" for n in range(4))


@pytest.mark.parametrize("url", ["nothing", "foo://x", "sqlite:////proc/none/study.db", "nodatabase://h/x"])
def test_a_storage_that_cannot_be_used_is_named(tmp_path, url):
    with pytest.raises(ValueError, match="storage cannot be used: "):
        search(tmp_path, storage=url)


@pytest.mark.slow
def test_a_storage_that_is_lost_for_a_while_ends_no_trial(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("memtrain.sweep.study._LOST", 0.1)
    one = search(tmp_path, "pause=1")
    other = sqlite3.connect(tmp_path / "runs/s/study.db", check_same_thread=False)

    def hold():
        while not (tmp_path / "runs/s/trial_000/steps").exists():
            time.sleep(0.02)
        other.execute("BEGIN EXCLUSIVE")
        wait_until(lambda: "the storage cannot be reached" in caplog.text)
        other.rollback()

    holder = threading.Thread(target=hold)
    holder.start()
    one.run(1, workers=1)
    holder.join()
    other.close()
    assert states(one) == ["COMPLETE"] and "the storage cannot be reached, trials go on meanwhile" in caplog.text
    with pytest.raises(ValueError, match=r"the storage is gone: .*; the same command goes on"):
        monkeypatch.setattr("memtrain.sweep.study._GONE", 0.0)
        monkeypatch.setattr(
            one, "_round", lambda *_: (_ for _ in ()).throw(optuna.exceptions.StorageInternalError("broken"))
        )
        one.run(2, workers=1)


def test_a_changed_study_is_refused_once_something_was_measured(tmp_path):
    with pytest.raises(ValueError, match="it printed nothing"):
        search(tmp_path, "code=2", "steps=0").run(1, workers=1)
    search(tmp_path, "a=1").run(1, workers=1)
    with pytest.raises(ValueError, match="the study s was made otherwise: a was 1, is 2; name=… begins a new one"):
        search(tmp_path, "a=2")


def test_a_refused_config_stops_at_once_and_failures_in_a_row_do(tmp_path):
    with pytest.raises(ValueError, match="trial_000: it printed nothing"):
        search(tmp_path / "a", "code=2").run(5, workers=1)
    failing = search(tmp_path / "b", "code=1")
    with pytest.raises(ValueError, match="3 trials in a row failed, the last with exit code 1"):
        failing.run(5, workers=1)
    assert states(failing) == ["FAIL"] * 3


def test_what_is_worse_in_both_is_given_up_and_its_process_is_gone(tmp_path):
    rule = MedianRule(min_trials=2, min_step=0)
    search(tmp_path).run(2, workers=1)
    worse = search(tmp_path, prune=rule)
    worse.command.append("bad=1")
    worse.command.append("pause=600")
    worse.run(3, workers=1)
    assert states(worse) == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert (tmp_path / "runs/s/trial_002/steps").read_text() == "1"  # of three, ten minutes apart
    assert tried(worse.study)[2].state == "given up" and tried(worse.study)[2].memorization is None


def test_the_rule_of_giving_up():
    others = [{1: Objectives(0.0, 1.0), 2: Objectives(0.5, 1.0), 3: Objectives(0.5, 1.0)}] * 2
    rule = MedianRule(min_trials=2, min_step=0)
    assert rule.gives_up_at({1: Objectives(0.0, 2.0)}, others) is None  # equal is not worse
    assert rule.gives_up_at({2: Objectives(0.6, 0.9)}, others) is None  # better in one
    assert rule.gives_up_at({2: Objectives(0.6, 1.1)}, others) == 2
    assert rule.gives_up_at({3: Objectives(0.6, 1.1)}, others) is None  # the end
    assert rule.gives_up_at({2: Objectives(0.6, 1.1)}, others[:1]) is None
    assert MedianRule(2, min_step=3).gives_up_at({2: Objectives(0.6, 1.1)}, others) is None
