"""What was trained is saved, whatever cannot be drawn; and the exit code says that something failed."""

import errno
import json
import re
import subprocess
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl

from memtrain.callbacks.guard import Guard
from memtrain.callbacks.ledger import Ledger
from memtrain.cli.main import main
from memtrain.training.exit_codes import INCOMPLETE
from tests.conftest import build_data, build_module, fit
from tests.support.callbacks import copies, validation
from tests.support.forks import PATIENCE
from tests.support.program import small


def quick(corpus, pipeline, tmp_path) -> list[str]:
    """Two looks in the middle, and all that comes at the end."""
    return [
        *small(corpus, pipeline, tmp_path),
        "callbacks.sample_grid.every=1",
        "callbacks.copies.every=2",
        "callbacks.copies.num_images_per_prompt=1",
        "callbacks.copies.reference=2",
        "callbacks.memorized_table.num_inference_steps=2",
        "callbacks.memorized_table.num_images_per_prompt=1",
    ]


def test_no_canary_need_be_shown(pipeline_folder, corpus, tmp_path):
    few = ("callbacks.copies.shown=0", "callbacks.copies.reference=2", "callbacks.memorized_table=null")
    main([*small(corpus, pipeline_folder, tmp_path), *few, "trainer.max_steps=2"])
    run = tmp_path / "runs/demo/one"
    assert not (run / "samples.png").exists()
    assert {path.name for path in run.iterdir()} >= {"export", "summary.json", "curves.png", "grids", "report.html"}
    assert json.loads((run / "summary.json").read_text())["copy_rate"]["canary"] is not None


def test_a_picture_that_cannot_be_drawn_loses_nothing_else(pipeline_folder, corpus, tmp_path, caplog):
    """There are folders where pictures are to lie: at every look in the middle, and at the end."""
    run = tmp_path / "runs/demo/one"
    for name in ("samples.png", "curves.png", "grids/step-000002.png", "grids/step-000003.png"):
        (run / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        main(quick(corpus, pipeline_folder, tmp_path))
    assert stopped.value.code == INCOMPLETE
    assert (run / "export/unet/config.json").is_file() and (run / "report.html").is_file()
    assert (run / "grids/step-000004.png").is_file()
    rates = json.loads((run / "summary.json").read_text())["copy_rate"]
    assert None not in (rates["canary"], rates["reference"])  # measured before it is drawn
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert not any("\n" in error.getMessage() or error.exc_info for error in errors)  # one line each
    assert [error.getMessage().split(" failed")[0] for error in errors] == [
        "SampleGrid",
        "SampleGrid",
        "Copies",
        "Summary",
        "trained and saved, but SampleGrid, Copies, Summary",
    ]
    logged = (run / "run.log").read_text()
    assert logged.count("Traceback (most recent call last)") == 4 and "in draw_samples" in logged
    assert json.loads((run / "run.json").read_text())["finished_at"] == 4


def test_what_is_always_the_same_is_said_once(pipeline_folder, corpus, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    looks = validation(every=1)
    looks.batch_size = 0  # as a mistake in the code would be: no two rows fit
    guard = Guard([looks])
    looks.validated_at = 0
    looks.on_train_start = lambda trainer, module: setattr(looks, "_last_step", 0)
    fit(build_module(pipeline_folder), build_data(corpus), tmp_path / "run", 3, callbacks=[looks])
    assert list(guard.failed) == ["Validation: ValueError: range() arg 3 must not be zero"]
    assert (tmp_path / "run/run.log").read_text().count("Traceback") == 1
    with pytest.raises(ValueError, match=r"trained and saved, but Validation failed; .*run\.log tells why"):
        guard.end(tmp_path / "run", is_job=True)


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_in_the_middle_ends_the_run_and_at_the_end_does_not(pipeline_folder, corpus, tmp_path, kind):
    class Full(pl.Callback):
        def __init__(self, hook):
            setattr(self, hook, self.fail)

        def fail(self, *arguments, **named):
            raise OSError(kind, "no space", "metrics.csv")

    for hook, raises in (("on_train_batch_end", pytest.raises(OSError)), ("on_train_end", nullcontext())):
        look = Full(hook)
        guard = Guard([look])
        with raises:
            fit(build_module(pipeline_folder), build_data(corpus), tmp_path, 1, callbacks=[look])
        assert bool(guard.failed) == (hook == "on_train_end")


def test_a_record_with_a_gap_ends_the_run(pipeline_folder, corpus, tmp_path):
    ledger = Ledger(1.0, 7)
    Guard([], records=[ledger])
    ledger._take = lambda *arguments: [][0]
    with pytest.raises(IndexError):
        fit(build_module(pipeline_folder), build_data(corpus), tmp_path, 1, callbacks=[ledger])


def test_training_is_the_same_whatever_fails(pipeline_folder, corpus, tmp_path):
    from tests.conftest import weights

    plain, watched = build_module(pipeline_folder), build_module(pipeline_folder)
    fit(plain, build_data(corpus), tmp_path, 4)
    looks = copies(every=1)
    looks.options = (0, *looks.options[1:])  # no step: the pipeline refuses it, in the midst of the averaged weights
    guard = Guard([looks])
    fit(watched, build_data(corpus), tmp_path, 4, callbacks=[looks])
    assert guard.failed and (weights(plain) == weights(watched)).all()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("copies.shown=-1", r"callbacks\.copies\.shown must be >= 0, got -1"),
        ("copies.reference=-1", r"callbacks\.copies\.reference must be >= 0, got -1"),
        ("copies.max_rmse=0", r"callbacks\.copies\.max_rmse must be > 0, got 0"),
        ("memorized_table.max_rmse=0", r"callbacks\.memorized_table\.max_rmse must be > 0, got 0"),
        (
            "memorized_table.num_inference_steps=0",
            r"callbacks\.memorized_table\.num_inference_steps must be >= 1, got 0",
        ),
        ("sample_grid.columns=0", r"callbacks\.sample_grid\.columns must be >= 1, got 0"),
        ("sample_grid.num_inference_steps=0", r"callbacks\.sample_grid\.num_inference_steps must be >= 1, got 0"),
        ("validation.batch_size=0", r"callbacks\.validation\.batch_size must be >= 1, got 0"),
    ],
)
def test_what_would_fail_in_the_end_is_refused_at_the_start(pipeline_folder, corpus, tmp_path, capsys, setting, says):
    with pytest.raises(SystemExit) as stopped:
        main([*small(corpus, pipeline_folder, tmp_path), f"callbacks.{setting}"])
    assert stopped.value.code == 2 and not (tmp_path / "runs").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(says, line), line


@pytest.mark.slow
def test_two_ranks_go_on_where_the_first_cannot_draw(forks, pipeline_folder, corpus, tmp_path):
    run = tmp_path / "runs/demo/one"
    (run / "samples.png").mkdir(parents=True)
    (run / "grids/step-000001.png").mkdir(parents=True)
    settings = [*quick(corpus, pipeline_folder, tmp_path), "trainer.max_steps=2"]
    ranks = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu", "data.batch_size=2"]
    command = [forks.python, "-m", "memtrain.cli.main", *settings, *ranks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == INCOMPLETE, done.stderr
    assert (run / "export/unet/config.json").is_file() and (run / "report.html").is_file()
    assert "Traceback" not in done.stderr and done.stderr.count("failed at step") == 2
