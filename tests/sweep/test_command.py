"""`memtrain sweep` as a user types it, and `memtrain train -m`, with real trainings."""

import json
import os
import re
import subprocess
import time

import optuna
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.trial import TrialState

from memtrain.cli import schema
from memtrain.cli.arguments import spelled
from memtrain.cli.main import config_folder, main
from memtrain.data.ledger import read_ledger
from memtrain.report.curves import read_metrics
from memtrain.sweep.space import merged, quoted
from memtrain.training.checks import check_reference
from tests.support.forks import PATIENCE, ROOT
from tests.support.program import fails, small, small_run


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
def test_a_sweep_of_real_trainings_killed_and_resumed(forks, corpus, pipeline_folder, tmp_path):
    """SIGKILL of the sweep in the middle: its trial ends with it, and the same command finishes it and the study."""
    options = [
        o for o in small(corpus, pipeline_folder, tmp_path)[3:] if not o.startswith(("run_id", "callbacks.sample_grid"))
    ]
    command = [forks.python, "-m", "memtrain.cli.main", "sweep", "trials=2", *options, "exclusion=fixed"]
    command += ["callbacks.copies.reference=4", "callbacks.curves.every=1", "study.prune=null", "trainer.max_steps=8"]
    command += [f"callbacks.{look}=null" for look in ("sample_grid", "memorized_table", "export")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    study = tmp_path / "runs" / "thresholds"
    run = study / "trial_000"
    first = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (run / "checkpoints" / "step-00000004.ckpt").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
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
    options = small_run(corpus, pipeline_folder, tmp_path / "runs", "exclusion=fixed", steps=1)[1:]
    options = [option for option in options if option != "callbacks.validation=null"]  # which says its step
    few = ("callbacks.validation.every=2", "callbacks.validation.timesteps_per_sample=2")
    main(["train", "-m", *options, *few, "exclusion.threshold=1,3"])
    runs = sorted(path.name for path in (tmp_path / "runs" / "faults").glob("many-*"))
    assert runs == ["many-0", "many-1"]
    for run, threshold in zip(runs, (1, 3), strict=True):
        config = yaml.safe_load((tmp_path / "runs" / "faults" / run / "config.yaml").read_text())
        assert config["exclusion"]["threshold"] == threshold and config["run_id"] == run
    first, second = ((tmp_path / "runs" / "faults" / run / "run.log").read_text() for run in runs)
    assert first.count("step 1 of 1") == second.count("step 1 of 1") == 1
