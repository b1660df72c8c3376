"""Trials and sweeps that are cut off, told to end or hang, and go on."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from memtrain.sweep.standing import tried
from memtrain.sweep.trial import Process, environment_of
from tests.support.searches import children, cut_off, search, states, swept


def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint_in_its_folder(tmp_path):
    folder = cut_off(tmp_path)
    cut = search(tmp_path)
    cut._take_back_the_dead()
    assert states(cut) == ["FAIL", "WAITING"]
    assert [(one.name, one.state) for one in tried(cut.study)] == [("trial_000", "waiting")]
    cut.run(2, workers=1)
    assert states(cut) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert (folder / "steps").read_text() == "123"
    first, again, _ = cut.study.get_trials()
    assert first.params == again.params and [step for step, *_ in again.user_attrs["curve"]] == [1, 2, 3]
    assert [(one.name, one.state, one.step) for one in tried(cut.study)] == [
        (f"trial_00{n}", "finished", 3) for n in range(2)
    ]
    whole = search(tmp_path / "whole")  # what is tried is what an undisturbed sweep tries
    whole.run(2, workers=1)
    assert [one.setting for one in tried(whole.study)] == [one.setting for one in tried(cut.study)]


def test_where_the_checkpoint_is_damaged_or_absent_a_run_begins_anew_in_its_folder(tmp_path):
    folder = cut_off(tmp_path)
    (folder / "checkpoint").write_text("damaged")
    search(tmp_path).run(1, workers=1)
    assert (folder / "steps").read_text() == "1123"
    for absent in ("checkpoint", "config.yaml"):
        folder = cut_off(tmp_path / absent)
        (folder / absent).unlink()
        again = search(tmp_path / absent)
        again.run(1, workers=1)
        assert (folder / "steps").read_text() == "1123"
        assert [(one.name, one.state) for one in tried(again.study)] == [("trial_000", "finished")]


def test_what_is_refused_when_it_goes_on_is_not_lost(tmp_path):
    """The data are not mounted yet, say: it goes on when the user has mended that."""
    folder = cut_off(tmp_path)
    refused = search(tmp_path)
    mended = list(refused.command)
    refused.command[1:] = ["-c", "import sys; print('error: no such shard'); sys.exit(2)"]
    with pytest.raises(ValueError, match="trial_000: no such shard"):
        refused.run(1, workers=1)
    again = search(tmp_path)
    again.command[:] = mended
    again.run(1, workers=1)
    assert (folder / "steps").read_text() == "123" and states(again)[-1] == "COMPLETE"


def test_a_trial_that_somebody_else_told_to_end_goes_on(tmp_path):
    one = search(tmp_path, "pause=0.5")
    going = one._start(dict(os.environ))
    one.going[0] = going
    while not (going.process.folder / "steps").exists():
        time.sleep(0.02)
    (child,) = Path(f"/proc/{going.process._guard.pid}/task/{going.process._guard.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    one.run(1, workers=1)
    assert states(one) == ["FAIL", "COMPLETE"] and sorted((going.process.folder / "steps").read_text()) == list("123")


def test_a_trial_that_hangs_is_ended_and_goes_on(tmp_path):
    one = search(tmp_path, "hang=1", patience=1.0)
    one.run(1, workers=1)
    assert states(one) == ["FAIL", "COMPLETE"] and (tmp_path / "runs/s/trial_000/steps").read_text() == "123"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_stops_a_sweep_and_a_scheduler_may_send_it_to_every_process(forks, tmp_path, number, code):
    """Then a trial gets it once, not a second time from the sweep: it would end at once, without a checkpoint."""
    sweep, run = swept(forks, tmp_path, "hang=1")
    (guard,) = children(sweep)
    everyone = [sweep, guard, *children(guard)] if number == signal.SIGUSR1 else [sweep]
    for process in everyone:
        os.kill(process, number)
    assert forks.wait() == [code]
    assert (run / "signals").read_text().split() == [str(int(signal.SIGTERM if everyone == [sweep] else number))]
    again = search(tmp_path, "hang=1", patience=2.0)
    assert states(again) == ["FAIL", "WAITING"]
    again.run(1, workers=1)
    assert (run / "steps").read_text() == "123" and states(again) == ["FAIL", "COMPLETE"]


@pytest.mark.slow
def test_a_second_signal_ends_a_sweep_at_once_and_its_trial_is_taken_back(forks, tmp_path):
    sweep, run = swept(forks, tmp_path, "hang=1", "stubborn=2")
    os.kill(sweep, signal.SIGINT)
    forks.wait_until((run / "signals").exists)
    os.kill(sweep, signal.SIGINT)
    assert forks.wait() == [130]  # nothing is waited for: its trial is on
    again = search(tmp_path, "hang=1", "stubborn=2")
    assert states(again) == ["RUNNING"]
    again.run(1, workers=1)
    assert states(again) == ["FAIL", "COMPLETE"] and (run / "steps").read_text() == "123"


def test_two_trials_never_write_one_folder_at_once(tmp_path):
    """A sweep that was killed may have left one, which has its time to end."""
    slow = "import signal, time; signal.signal(15, lambda *_: (time.sleep(2), print('first', flush=True), exit(0))); "
    first = Process(
        [sys.executable, "-c", slow + "print('on', flush=True); time.sleep(100)"], tmp_path, dict(os.environ)
    )
    while "on" not in (tmp_path / "trial.log").read_text():
        time.sleep(0.02)
    first.let_go()
    second = Process([sys.executable, "-c", "print('second')"], tmp_path, dict(os.environ))
    while second.exit_code is None:
        time.sleep(0.02)
    first.wait()
    second.wait()
    said = (tmp_path / "trial.log").read_text().split("\n")
    assert said == ["on", "waiting for the trial that still ends in this folder", "first", "second", ""]


def test_a_group_ends_whole_when_it_is_let_go(tmp_path):
    child = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '100']); "
        "print(p.pid, flush=True); time.sleep(100)"
    )
    process = Process([sys.executable, "-c", child], tmp_path / "run", dict(os.environ))
    log = tmp_path / "run" / "trial.log"
    while not log.read_text().strip():
        time.sleep(0.05)
    grandchild = int(log.read_text())
    process.wait()
    assert process.exit_code == 128 + signal.SIGTERM
    status = Path(f"/proc/{grandchild}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_workers_share_cores_and_gpus_and_no_rank_is_inherited(monkeypatch):
    for name in ("RANK", "SLURM_NTASKS", "MEMTRAIN_RUN_ID"):
        monkeypatch.setenv(name, "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    own = environment_of(1, 2, 8, ["0", "1", "2", "3"])
    assert (own["OMP_NUM_THREADS"], own["CUDA_VISIBLE_DEVICES"]) == ("4", "1,3")
    assert not {"RANK", "SLURM_NTASKS", "MEMTRAIN_RUN_ID"} & own.keys()
    assert environment_of(2, 3, 2, ["5", "6"])["CUDA_VISIBLE_DEVICES"] == "5"
