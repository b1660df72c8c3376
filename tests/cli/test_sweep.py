"""`memtrain sweep`: the search, killed and resumed; `memtrain train -m`; W&B's sweep file."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.trial import TrialState

from memtrain.callbacks.logging import dashboard_name
from memtrain.cli import schema
from memtrain.cli.arguments import spelled
from memtrain.cli.main import config_folder, main
from memtrain.data.ledger import read_ledger
from memtrain.report.curves import read_metrics
from memtrain.sweep.plan import Plan
from memtrain.sweep.pruning import MedianRule, Objectives
from memtrain.sweep.space import Parameter, check_space, merged, quoted, spell, suggest
from memtrain.sweep.standing import spoken, tried
from memtrain.sweep.study import Search
from memtrain.sweep.trial import Process, environment_of
from memtrain.training.checks import check_reference
from tests.cli.test_main import fails, small

REPO = Path(__file__).resolve().parents[2]
# A training program that takes no time: the copy rate falls with the threshold, the loss rises. It keeps its step,
# as a checkpoint, goes on from there with resume=, and writes down every step that it makes.
QUICK = """
import pathlib, signal, sys, time
said = dict(part.split("=", 1) for part in sys.argv[1:])
folder = pathlib.Path(said["runs_dir"].strip("'")) / said["name"].strip("'") / said["run_id"]
(folder / "config.yaml").touch()
checkpoint, metrics = folder / "checkpoint", folder / "metrics.csv"
begun = 0
if "resume" in said:
    assert pathlib.Path(said["resume"].strip("'")) == folder
    if checkpoint.exists() and checkpoint.read_text() == "damaged":
        print("error: it is damaged")
        sys.exit(2)
    begun = int(checkpoint.read_text()) if checkpoint.exists() else 0
def told(number, frame):
    with open(folder / "signals", "a") as file:
        file.write(f"{number} ")
    time.sleep(float(said.get("stubborn", 0)))
    sys.exit(143)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, told)
x = float(said["x"])
worse = 1 if said.get("bad") else 0
rows = metrics.read_text().splitlines()[1 : begun + 1] if begun else []
for step in range(begun + 1, int(said.get("steps", 3)) + 1):
    rows.append(f"{step},{1 - x + worse},{x + worse}")
    metrics.write_text("\\n".join(["step,copy_rate/canary,heldout_loss", *rows, ""]))
    checkpoint.write_text(str(step))
    with open(folder / "steps", "a") as file:
        file.write(str(step))
    time.sleep(100 if "hang" in said and "resume" not in said else float(said.get("pause", 0)))
sys.exit(int(said.get("code", 0)))
"""


def search(tmp_path, *overrides: str, prune=None, space=None, seed=0, storage=None, patience=None) -> Search:
    tmp_path.mkdir(exist_ok=True)
    if not (tmp_path / "quick.py").exists():
        (tmp_path / "quick.py").write_text(QUICK)
    space = space or [Parameter("x", "x", low=0.0, high=1.0)]
    plan = Plan("s", tmp_path / "runs", list(overrides), space, "copy_rate/canary", "heldout_loss", 2, seed, 0.02)
    return Search(plan, storage, [sys.executable, str(tmp_path / "quick.py")], prune, patience)


def states(one: Search) -> list[str]:
    return [trial.state.name for trial in one.study.get_trials()]


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


def cut_off(tmp_path) -> Path:
    """A sweep that is gone, with its trial, when that has made its first step. The trial's folder."""
    one = search(tmp_path)
    one.command.append("hang=1")
    process = one._start(dict(os.environ)).process
    made = process.folder / "steps"
    while not made.exists() or made.read_text() != "1":
        time.sleep(0.02)
    process.wait()
    return process.folder


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


# A sweep as `memtrain sweep` runs it, with the trainer above: a folder, then overrides.
SWEEP = """
import sys
from pathlib import Path
from memtrain.cli.sweep import stopped_by_signals
from memtrain.training.stops import EXIT_CODES
from tests.cli.test_sweep import search
one = search(Path(sys.argv[1]), *sys.argv[2:])
with stopped_by_signals(one, EXIT_CODES) as received:
    one.run(2, workers=1)
sys.exit(EXIT_CODES[received[0]] if received else 0)
"""


@contextmanager
def swept(folder: Path, *overrides: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A sweep whose first trial has made its first step, and that trial's folder."""
    start = [sys.executable, "-c", SWEEP, str(folder), *overrides]
    run = folder / "runs" / "s" / "trial_000"
    with subprocess.Popen(start, env=os.environ | {"PYTHONPATH": str(REPO)}) as sweep:
        try:
            while not (run / "steps").exists():
                assert sweep.poll() is None
                time.sleep(0.02)
            yield sweep, run
        finally:
            sweep.kill()


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_stops_a_sweep_and_a_scheduler_may_send_it_to_every_process(tmp_path, number, code):
    """Then a trial gets it once, not a second time from the sweep: it would end at once, without a checkpoint."""
    with swept(tmp_path, "hang=1") as (sweep, run):
        (guard,) = children(sweep.pid)
        everyone = [sweep.pid, guard, *children(guard)] if number == signal.SIGUSR1 else [sweep.pid]
        for process in everyone:
            os.kill(process, number)
        assert sweep.wait(timeout=1200) == code
    assert (run / "signals").read_text().split() == [str(int(signal.SIGTERM if everyone == [sweep.pid] else number))]
    again = search(tmp_path, "hang=1", patience=2.0)
    assert states(again) == ["FAIL", "WAITING"]
    again.run(1, workers=1)
    assert (run / "steps").read_text() == "123" and states(again) == ["FAIL", "COMPLETE"]


@pytest.mark.slow
def test_a_second_signal_ends_a_sweep_at_once_and_its_trial_is_taken_back(tmp_path):
    with swept(tmp_path, "hang=1", "stubborn=10") as (sweep, run):
        sweep.send_signal(signal.SIGINT)
        while not (run / "signals").exists():
            time.sleep(0.02)
        sweep.send_signal(signal.SIGINT)
        assert sweep.wait(timeout=1200) == 130  # nothing is waited for: its trial is on
    again = search(tmp_path, "hang=1", "stubborn=10")
    assert states(again) == ["RUNNING"]
    again.run(1, workers=1)
    assert states(again) == ["FAIL", "COMPLETE"] and (run / "steps").read_text() == "123"


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


@pytest.mark.slow
def test_sweeps_that_start_at_once_share_a_study(tmp_path):
    """One of them makes the tables, and no trial is done twice or too often."""
    code = """
import sys, time
from pathlib import Path
from tests.cli.test_sweep import search
print("ready", flush=True)
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.001)
search(Path(sys.argv[1]), "pause=0.1").run(4, workers=1)
"""
    (tmp_path / "quick.py").write_text(QUICK)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    start = dict(env=environment, stdout=subprocess.PIPE)
    sweeps = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **start) for _ in range(2)]
    for sweep in sweeps:
        with sweep.stdout:
            sweep.stdout.readline()
    (tmp_path / "go").touch()
    assert [sweep.wait(timeout=1200) for sweep in sweeps] == [0, 0]
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
        time.sleep(8)
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


def test_conditions_and_keys_that_are_fixed(tmp_path):
    space = [
        Parameter("rule", "exclusion", choices=["none", "fixed"]),
        Parameter("fixed", "exclusion.threshold", low=1.0, high=4.0, log=True, when="rule=fixed"),
    ]
    for rule, keys in (("none", set()), ("fixed", {"exclusion.threshold"})):
        one = search(tmp_path / rule, f"exclusion={rule}", space=space)
        trial = one.study.ask()
        assert {override.split("=")[0] for override in suggest(trial, space, one.plan.fixed)} == keys
    assert merged(["a=1", "b=2"], ["+a=3"]) == ["+a=3", "b=2"]


@pytest.mark.parametrize(
    ("parameter", "says"),
    [
        (dict(low=1.0), "study.space.p needs choices, or low and high"),
        (dict(choices=[]), r"study.space.p.choices must name at least one value, got \[\]"),
        (dict(low=2.0, high=1.0), "study.space.p: low must be < high, got 2 and 1"),
        (dict(low="a", high="b"), "study.space.p: low and high must be numbers, got a and b"),
        (dict(low=0.0, high=1.0, log=True), "study.space.p.low must be > 0 with log=true, got 0"),
    ],
)
def test_a_wrong_space_is_named(parameter, says):
    with pytest.raises(ValueError, match=says):
        Parameter("p", "k", **parameter)


def test_a_condition_that_never_holds_is_named():
    rule = Parameter("rule", "exclusion", choices=["none", "fixed"])
    check_space([rule, Parameter("t", "k", low=1, high=2, when="rule=fixed")])
    for when in ("rule", "role=fixed", "rule=fixd"):
        with pytest.raises(ValueError, match=r"study\.space\.t\.when"):
            check_space([rule, Parameter("t", "k", low=1, high=2, when=when)])


def test_choices_are_what_the_command_line_would_give():
    choices = [1e-5, 0.123456, True, None, [500, 1000], [[0.9, 0.99], ["a", None]], "'a, b'", 3]
    read = [OverridesParser.create().parse_override(f"k={spell(choice)}").value() for choice in choices]
    assert read == [*choices[:-2], "a, b", 3]


def test_what_is_said_beside_the_sweeps_own_keys_is_for_the_trials():
    own = ["study=thresholds", "trials=6", "study.space.fixed.high=3", "--cfg", "job"]
    assert spelled("sweep", [*own, "seed=3", "w='a'"]) == [r"overrides=['seed=3','w=\'a\'']", *own]
    assert spelled("sweep", own) == own
    assert spelled("sweep", ["--config-dir", "mine", "seed=3", "study=mine"]) == [
        "--config-dir",
        "mine",
        "overrides=['seed=3']",
        "study=mine",
    ]


@pytest.mark.slow
def test_a_study_of_your_own(capsys, tmp_path):
    """A file in a folder of yours, with what it changes, and lists as choices."""
    runs = tmp_path / "a b,c's"
    (tmp_path / "study").mkdir()
    lr, timesteps = "lr: {key: optimizer.lr, low: 1e-5, high: 1e-3, log: true}", "[[700, 1000]]"
    space = f"{{{lr}, ts: {{key: score.timesteps, choices: {timesteps}}}}}"
    (tmp_path / "study" / "mine.yaml").write_text(f"defaults: [thresholds, _self_]\nspace: {space}\n")
    own = ["--config-dir", str(tmp_path), "study=mine", f"runs_dir={quoted(str(runs))}", "study.prune=null"]
    assert "no such shard" in fails(capsys, "sweep", *own, "data.shards='/nowhere/it,s.tar'", "exclusion=iet_agc")
    study = runs / "mine"
    (trial,) = optuna.load_study(study_name="mine", storage=f"sqlite:///{study}/study.db").get_trials()
    rate, timesteps = trial.user_attrs["overrides"]
    assert rate == f"optimizer.lr={trial.params['lr']:.4g}" and timesteps == "score.timesteps=[700,1000]"
    assert "/nowhere/it,s.tar" in (study / "trial_000" / "trial.log").read_text()


def test_a_wrong_key_is_named_before_anything_is_started(capsys, tmp_path):
    assert "study" in fails(capsys, "sweep", "study=treshold")
    assert "trials must be >= 1, got 0" in fails(capsys, "sweep", "trials=0", f"runs_dir={tmp_path}/runs")
    assert "run_id=x" in fails(capsys, "sweep", "run_id=x", f"runs_dir={tmp_path}/runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("study", [path.stem for path in (config_folder() / "study").glob("*.yaml")])
@pytest.mark.parametrize("experiment", [None, "wen2024"])
def test_a_study_says_what_its_trials_need_and_leaves_the_rest_to_the_experiment(study, experiment):
    schema.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        sweep = OmegaConf.to_container(compose("sweep", [f"study={study}", f"name={study}"]))
        own = [] if experiment is None else [f"experiment={experiment}"]
        for rule in sweep["study"]["space"]["rule"]["choices"]:
            cfg = compose("train", merged(sweep["study"]["overrides"], own, [f"exclusion={rule}"]))
            check_reference(instantiate(cfg.exclusion), cfg.reference.count)
            callbacks = cfg.callbacks
            assert cfg.canaries.sacrificed < cfg.canaries.count and cfg.reference.count and "csv" in cfg.logger
            assert callbacks.copies.every == callbacks.checkpoint.every == callbacks.validation.every
            assert cfg.trainer.max_steps % callbacks.validation.every == 0
        alone = compose("train", own or ["experiment=demo_sweep"])
    assert cfg.optimizer == alone.optimizer and cfg.canaries.repeats == alone.canaries.repeats


@pytest.mark.slow
def test_a_sweep_of_real_trainings_killed_and_resumed(corpus, pipeline_folder, tmp_path):
    """SIGKILL of the sweep in the middle: its trial ends with it, and the same command finishes it and the study."""
    options = [
        o for o in small(corpus, pipeline_folder, tmp_path)[2:] if not o.startswith(("run_id", "callbacks.sample_grid"))
    ]
    command = [sys.executable, "-m", "memtrain.cli.main", "sweep", "trials=2", *options, "exclusion=fixed"]
    command += ["callbacks.copies.reference=4", "callbacks.curves.every=1", "study.prune=null", "trainer.max_steps=8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    study = tmp_path / "runs" / "thresholds"
    run = study / "trial_000"
    first = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (run / "checkpoints" / "step-00000004.ckpt").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "trial_000 was cut off" in done.stderr and "trial_000 goes on" in done.stderr
    opened = optuna.load_study(study_name="thresholds", storage=f"sqlite:///{study}/study.db")
    trials = opened.get_trials()
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert trials[1].params == trials[0].params
    for name in ("pareto.png", "trials.csv", "report.html", "trial_000/report.html", "trial_001/ledger"):
        assert (study / name).exists(), name
    assert "Take trial_00" in done.stdout and "memtrain train experiment=demo" in done.stdout
    for trial, name in zip(trials[1:], ("trial_000", "trial_001"), strict=True):
        summary = json.loads((study / name / "summary.json").read_text())
        assert trial.values == pytest.approx([summary["copy_rate"]["canary"], summary["heldout_loss"]])
    said = (run / "trial.log").read_text()
    assert int(re.search(r"going on from .*/step-(\d+)\.ckpt", said)[1]) >= 4
    whole = study / "trial_001"  # was never cut off, and has as many rows
    ours, theirs = (read_metrics(one / "metrics.csv") for one in (run, whole))
    assert {name: steps for name, (steps, _) in ours.items()} == {name: steps for name, (steps, _) in theirs.items()}
    ours, theirs = (read_ledger(one).to_table(["step", "key", "timestep"]).sort_by("step") for one in (run, whole))
    assert ours.equals(theirs)


def test_train_with_several_values_makes_a_run_of_each(corpus, pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMTRAIN_RUN_ID", "many")
    options = [option for option in small(corpus, pipeline_folder, tmp_path)[1:] if not option.startswith("run_id")]
    quick = [
        "callbacks.copies=null",
        "callbacks.report=null",
        "callbacks.export=null",
        "callbacks.memorized_table=null",
    ]
    main(["train", "-m", *options, *quick, "exclusion=fixed", "exclusion.threshold=1,3", "trainer.max_steps=1"])
    runs = sorted(path.name for path in (tmp_path / "runs" / "demo").glob("many-*"))
    assert runs == ["many-0", "many-1"]
    for run, threshold in zip(runs, (1, 3), strict=True):
        config = yaml.safe_load((tmp_path / "runs" / "demo" / run / "config.yaml").read_text())
        assert config["exclusion"]["threshold"] == threshold and config["run_id"] == run
    first, second = ((tmp_path / "runs" / "demo" / run / "run.log").read_text() for run in runs)
    assert first.count("step 1 of 1") == second.count("step 1 of 1") == 1


WANDB = yaml.safe_load((REPO / "launch" / "wandb_sweep.yaml").read_text())


def test_wandbs_sweep_file_fits_its_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(Path(__file__).with_name("wandb_sweep_schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(WANDB)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate(WANDB | {"methd": "random"})


def test_what_wandbs_agent_starts_composes():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    assert WANDB["metric"]["name"] == dashboard_name("copy_rate/canary")
    drawn = {k: {"value": p.get("min", (p.get("values") or [0])[0])} for k, p in WANDB["parameters"].items()}
    arguments = create_sweep_command_args({"args": drawn})["args_no_hyphens"]
    command = [part for part in WANDB["command"] if not re.match(r"\$\{", part)]
    assert command[:2] == ["memtrain", "train"]
    schema.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", [*command[2:], *arguments])
    assert cfg.exclusion.false_positive_rate == 0.0001 and cfg.exclusion.memory == 0.8
