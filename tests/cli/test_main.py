"""The program as a user meets it: help, composition, wrong things in one line."""

import errno
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from memtrain.cli import schema
from memtrain.cli.errors import one_line
from memtrain.cli.main import config_folder, main
from memtrain.core.exclusion import ExclusionRule
from memtrain.models.adapters import Adapter, LowRank
from tests.support.forks import PATIENCE
from tests.support.program import fails, small

CONF = config_folder()
OTHERS = ("study", "attack", "protocol")  # groups of sweep, evaluate and bench
CHOICES = sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name not in OTHERS)  # of train
EXPERIMENTS, RULES, ADAPTERS = (
    [path.stem for path in CHOICES if path.parent.name == group] for group in ("experiment", "exclusion", "adapter")
)


def test_help_says_what_to_type_next(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert "memtrain demo" in text and "memtrain train experiment=demo" in text


def test_train_help_lists_the_groups(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert not stopped.value.code
    text = capsys.readouterr().out
    groups = text[text.index("Groups") : text.index("Config")]
    for path in CHOICES:
        assert re.search(rf"^  {path.parent.name} ", groups, re.M) and re.search(rf"\b{path.stem}\b", groups), path
    assert "ckpt_path" in text


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_says_what_it_costs(experiment):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"experiment={experiment}"])
    assert cfg.name == experiment
    header = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert "memtrain train experiment=" in header and "# Cost:" in header and "# Expected:" in header


def test_every_rule_and_every_adapter_goes_with_every_experiment():
    """For each composes with the first, and no experiment says a key of theirs, which another might not have."""
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for rule, adapter in zip(RULES, itertools.cycle(ADAPTERS), strict=False):  # more rules than adapters
            cfg = compose("train", [f"experiment={EXPERIMENTS[0]}", f"exclusion={rule}", f"adapter={adapter}"])
            assert isinstance(instantiate(cfg.exclusion), ExclusionRule)
            built = instantiate(cfg.adapter)
            assert type(built) is (Adapter if adapter == "none" else LowRank)
            assert getattr(built, "use_dora", False) == (adapter == "dora")
    for experiment in EXPERIMENTS:
        said = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())
        assert not {"exclusion", "adapter"} & said.keys()


def rounds() -> list[list[str]]:
    """Words that choose a file of every group at once, as often as it takes for each to be chosen."""
    groups = [list(files) for _, files in itertools.groupby(CHOICES, key=lambda path: path.parent.name)]
    groups = [files for files in groups if files[0].parent.name != "experiment"]
    return [
        [f"{files[turn % len(files)].parent.name}={files[turn % len(files)].stem}" for files in groups]
        for turn in range(max(map(len, groups)))
    ]


@pytest.mark.parametrize("choices", rounds(), ids=" ".join)
def test_every_choice_composes(choices):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose("train", choices)


@pytest.mark.parametrize(
    ("choices", "score", "own_visits"),
    [
        ("exclusion=evidence", "anchored", 0),
        ("exclusion=evidence score=magnitude", "magnitude", 0),
        ("exclusion=evidence score=both score.rule=anchored", "anchored", 0),
        ("exclusion=evidence_by_magnitude", "magnitude", 6),
        ("experiment=demo", "anchored", 0),
        ("experiment=demo exclusion=fixed", "magnitude", None),
    ],
)
def test_a_rule_brings_the_score_that_it_goes_by_and_a_choice_of_score_wins(choices, score, own_visits):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", choices.split())
    assert (cfg.score.rule, cfg.exclusion.get("own_visits")) == (score, own_visits)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["exclusion.threshold=-1", "exclusion=fixed"],
            r"exclusion\.threshold must be > 0, got -1; use exclusion=none",
        ),
        (["exclusion=fixd"], "fixd.*evidence.*fixed.*none"),
        (["trainer.max_steps=abc"], "abc.*trainer.max_steps|trainer.max_steps.*abc"),
        (
            ["exclusion=fixed", "exclusion.treshold=1"],
            r"no key exclusion\.treshold; did you mean exclusion\.threshold\?",
        ),
        (["data.batch_sise=3"], r"no key data\.batch_sise; did you mean data\.batch_size"),
        (
            ["callbacks.copies.num_steps=3"],
            r"num_steps; did you mean callbacks\.copies\.num_inference_steps",
        ),
        (["callbacks.copies.generations=3"], r"; callbacks\.copies has every, .*num_images_per_prompt, "),
        (["nmae=x"], r"no key nmae; did you mean name"),
        (["callbacks.validation.every=often"], "often"),
        (["optimizer.schedule=linear"], "optimizer.schedule must be one of.*got linear"),
        (["callbacks.export.dtype=int8"], "callbacks.export.dtype.*int8"),
        (["loss.caption_dropout=2"], "loss.caption_dropout.*2"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt: no such file"),
        (["data.shards=nowhere"], "data.shards=nowhere: no such shard"),
        (["data.shards={tmp}"], "no .tar in it"),
        (["model.pretrained={tmp}"], "is not a pipeline: it has no model_index.json"),
        (["model.pretrained={tmp}/none"], "no such folder"),
        (["data.batch_size=100"], "fewer than one global batch of 100"),
        (["reference.count=0"], "Evidence.*reference.count is 0"),
        (["canaries.count=40"], "canaries.count=40"),
        (["data.resolution=50"], "data.resolution must be a multiple of"),
        (["score.every=0"], "score.every"),
        (["logger=wandb", "logger.wandb.mode=on"], "logger.wandb.mode must be offline or online, got on"),
        (["seed=1", "=3"], "."),
        (
            ["callbacks.copies=null", "callbacks.copies.num_inference_steps=3"],
            r"copies\.num_inference_steps=3 sets a part of callbacks\.copies, which is null",
        ),
        (["score.timesteps.1=900"], r"score\.timesteps\.1=900 sets a part of score\.timesteps, which is null"),
        (["callbacks.sample_grid.prompts.first=fox"], r"callbacks\.sample_grid\.prompts\.first=fox cannot be set"),
    ],
)
def test_wrong_things_end_in_one_line(capsys, corpus, pipeline_folder, tmp_path, overrides, says):
    overrides = [text.format(tmp=tmp_path) for text in overrides]
    line = fails(capsys, *small(corpus, pipeline_folder, tmp_path), *overrides)
    assert re.search(says, line), line
    assert not (tmp_path / "runs").exists()  # before any work is done


def test_a_reader_that_has_seen_enough_is_no_error(forks, corpus):
    check = subprocess.Popen(
        [forks.python, "-m", "memtrain.cli.main", "shards", "check", str(corpus), "--json", "--workers=1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    check.stdout.close()
    assert check.wait(timeout=PATIENCE) == 1 and check.stderr.read() == b""
    check.stderr.close()


def test_no_command_of_that_name(capsys):
    assert "no command 'trian'" in fails(capsys, "trian")


def test_a_full_disk_is_named(capsys, corpus, pipeline_folder, tmp_path, monkeypatch):
    full = os.statvfs_result((4096, 4096, 10**6, 10, 10, 10, 10, 10, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    line = fails(capsys, *small(corpus, pipeline_folder, tmp_path))
    assert "disk is too full" in line and "0 MB free" in line and "runs_dir=" in line
    said = one_line(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"))
    assert said == "No space left on device: runs/x; free some space or write to another folder"


def test_a_bug_of_ours_keeps_its_traceback():
    assert one_line(TypeError("unexpected")) is None


def test_demo_writes_a_corpus_and_refuses_a_foreign_folder(capsys, tmp_path):
    small = [str(tmp_path / "a"), "num_samples=20", "shard_size=10"]
    assert "the canaries are 2878 samples, more than num_samples=20" in fails(capsys, "demo", *small)
    assert "repeated must be >= 0 and copies >= 1, got -1" in fails(capsys, "demo", *small, "repeated=-1")
    main(["demo", *small, "pictures=noto", "repeated=6", "copies=2"])
    assert "wrote 20 samples in 2 shards" in capsys.readouterr().out
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    assert str(tmp_path / "b") in fails(capsys, "demo", str(tmp_path / "b"))


def test_a_run_leaves_everything_that_is_promised(capsys, corpus, pipeline_folder, tmp_path):
    argv = small(corpus, pipeline_folder, tmp_path)
    argv = [("logger=[csv,wandb,tensorboard]" if arg == "logger=csv" else arg) for arg in argv]
    main([*argv, "exclusion.warmup=1"])
    run = tmp_path / "runs" / "demo" / "one"
    for name in (
        "config.yaml",
        "metrics.csv",
        "curves.png",
        "samples.png",
        "checkpoints/last.ckpt",
        "run.log",
        "canaries.csv",
        "report.html",
    ):
        assert (run / name).stat().st_size > 0 or name == "run.log", name
    assert list((run / "grids").glob("*.png")) and list((run / "tensorboard").glob("events*"))
    assert list((run / "wandb").glob("offline-run-*"))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["samples_seen"] == 16 and summary["updates_skipped"] == 0
    assert summary["samples_per_second"] > 0 and 0 < summary["heldout_loss"] < 10
    for group in ("canary", "train", "reference"):
        assert summary["score"][group]["mean"] > 0
        assert 0 <= summary["score"][group]["excluded_fraction"] <= 1
    assert 0 <= summary["auc_canary_vs_reference"] <= 1 and 0 <= summary["tpr_at_1pct_fpr"] <= 1
    assert set(summary["copy_rate"]) == {"canary", "reference", "sacrificed"}
    out = capsys.readouterr().out
    assert "held-out loss" in out and str(run / "samples.png") in out and str(run / "export") in out

    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(run / "export", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("fox on a teal background", num_inference_steps=2).images[0]
    assert image.size == (64, 64)

    # and it resumes: from step 4 to 6, without a second validation of step 0
    looks = ("copies", "sample_grid", "memorized_table", "export", "report")
    main(
        [
            arg
            for arg in argv
            if not arg.startswith(
                ("run_id", "trainer.max_steps", "logger", "callbacks.copies", "callbacks.sample_grid")
            )
        ]
        + ["run_id=two", "trainer.max_steps=6", f"ckpt_path={run}/checkpoints/last.ckpt", "logger=tensorboard"]
        + [f"callbacks.{look}=null" for look in looks]
    )
    summary = json.loads((run.parent / "two" / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["samples_seen"] == 24


@pytest.mark.slow
def test_the_program_itself_fails_within_seconds(corpus, tmp_path):
    program = Path(sys.executable).parent / "memtrain"
    done = subprocess.run(
        [program, "train", "experiment=demo", "exclusion=fixd"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=PATIENCE,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_windows_is_told_in_one_line_before_anything_is_imported_that_it_lacks():
    program = (
        "import sys, signal, memtrain; sys.platform = 'win32'; sys.modules['fcntl'] = None; del signal.SIGUSR1; "
        "from memtrain.cli.main import main; main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: memtrain runs on Linux and macOS") and done.stderr.count("\n") == 1


def test_yaml_spells_infinity_with_a_dot(capsys):
    main(["train", "--cfg", "job", "exclusion=fixed", "exclusion.threshold=.inf"])
    assert re.search(r"threshold: \.?inf", capsys.readouterr().out)


def test_a_class_of_the_users_own_folder_is_found_by_the_console_script(capsys, tmp_path, monkeypatch):
    """As README says: it stands in mine.py, where the program is started; the script's Python does not look there."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom memtrain.core.exclusion import Decision, ExclusionRule\n"
        "class LowLoss(ExclusionRule):\n"
        "    def decide(self, observed):\n"
        "        threshold = torch.full_like(observed.loss, 0.01)\n"
        "        return Decision(keep_mask=observed.loss > threshold, threshold=threshold)\n"
        "print('mine is imported')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    words = ["exclusion=none", "exclusion._target_=mine.LowLoss", "trainer=cpu", "logger=csv"]
    (tmp_path / "empty.tar").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["train", "experiment=demo_noto", *words, "data.shards=empty.tar"])
    said = capsys.readouterr()
    assert "mine is imported" in said.out, said.err  # the rule was built: what comes after it is wrong
    assert stopped.value.code == 2 and "empty.tar" in said.err
    monkeypatch.delitem(sys.modules, "mine")


def test_a_rule_of_ones_own_has_a_file_of_its_own_and_a_misspelt_key_of_it_is_named(capsys, tmp_path):
    (tmp_path / "exclusion").mkdir()
    (tmp_path / "exclusion" / "mine.yaml").write_text("# Left out below a loss\n_target_: mine.LowLoss\nlevel: 0.5\n")
    argv = ["train", "--config-dir", str(tmp_path), "--cfg", "job", "exclusion=mine"]
    main([*argv, "exclusion.level=0.7"])
    assert "_target_: mine.LowLoss\n  level: 0.7\n" in capsys.readouterr().out
    assert "no key exclusion.levle; did you mean exclusion.level?" in fails(capsys, *argv, "exclusion.levle=0.7")
    main(["train", "--cfg", "job", "exclusion=none", "exclusion._target_=mine.LowLoss", "+exclusion.level=0.7"])
    assert "_target_: mine.LowLoss\n  level: 0.7\n" in capsys.readouterr().out
