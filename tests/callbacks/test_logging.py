"""Loggers hold the same figures, in the same rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from memtrain.callbacks.curves import MemorizationCurves
from memtrain.callbacks.logging import SAMPLES_SEEN, MetricsFile, dashboard_name, wandb_logger
from memtrain.callbacks.summary import Summary
from memtrain.core.exclusion import FixedThreshold
from memtrain.report.curves import read_metrics
from tests.conftest import build_data, build_module
from tests.support.callbacks import copies, pixels, table, validation
from tests.support.forks import PATIENCE


def read_wandb(folder: Path) -> list[dict]:
    """Rows of an offline run, as `wandb leet inspect` reads them back."""
    program = Path(sys.executable).parent / "wandb"
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    done = subprocess.run(
        [program, "leet", "inspect", "--json", path], check=True, capture_output=True, text=True, timeout=PATIENCE
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.fixture(scope="module")
def run(pipeline_folder, corpus, tmp_path_factory) -> Path:
    """The folder of a run that was logged everywhere."""
    import wandb

    folder = tmp_path_factory.mktemp("logged")
    loggers = [
        wandb_logger("tests", "offline", "logged", str(folder)),
        TensorBoardLogger(str(folder), name="tensorboard", version=""),
        MetricsFile(str(folder)),
    ]
    curves = MemorizationCurves(every=2, high_noise=0.5)
    callbacks = [curves, validation(every=3), copies(every=2), table(), Summary()]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=6, max_epochs=-1, logger=loggers, default_root_dir=folder,
        callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, gradient_clip_val=1.0, log_every_n_steps=1,
    )  # fmt: skip
    module = build_module(pipeline_folder, FixedThreshold(0.6), reference_every=1, reference_batch=32)
    trainer.fit(module, datamodule=build_data(corpus, batch_size=8))
    wandb.finish()
    return folder


def test_an_offline_wandb_run_holds_the_curves_of_the_csv(run):
    columns = read_metrics(run / "metrics.csv")
    assert len(columns) > 100
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_wandb(run):
        step = row["trainer/global_step"]
        for name, value in row.items():
            if isinstance(value, int | float) and not name.startswith(("_", "trainer/")):
                steps, values = found.setdefault(name, ([], []))
                steps.append(int(step))
                values.append(float(value))
    curves = {dashboard_name(name): curve for name, curve in columns.items()}
    assert {name: found.get(name) for name in curves} == curves


def test_wandb_has_ordered_sections_pictures_histograms_and_the_table(run):
    rows = read_wandb(run)
    names = {name for row in rows for name in row}
    sections = sorted({name.split("/")[0] for name in names if "/" in name} - {"trainer"})
    assert [section[0] for section in sections] == list("abcdefgh")  # nothing in i_other
    text = json.dumps(rows)
    for kind in ("histogram", "table-file", "images/separated"):
        assert f'"{kind}"' in text, kind
    tables = list(run.glob("wandb/offline-run-*/files/media/table/**/*.table.json"))
    assert len(tables) == 1
    table_ = json.loads(tables[0].read_text())
    assert table_["columns"][:2] == ["image", "caption"] and len(table_["data"]) == 4
    assert list(run.glob("wandb/offline-run-*/files/media/images/**/*.png"))


def test_tensorboard_holds_the_curves_of_the_csv(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for name, (steps, values) in read_metrics(run / "metrics.csv").items():
        found = events.Scalars(dashboard_name(name))
        assert [event.step for event in found] == steps
        np.testing.assert_allclose([event.value for event in found], values, rtol=1e-6)  # held as float32
    tags = events.Tags()
    assert "g_pictures/samples_most_memorized" in tags["images"] and "g_pictures/curves" in tags["images"]
    assert "f_histograms/score_histogram/train" in tags["histograms"]


def test_every_row_says_how_many_samples_were_seen(run):
    columns = read_metrics(run / "metrics.csv")
    steps, seen = columns[SAMPLES_SEEN]
    assert seen == [step * 8 for step in steps] and set(steps) >= {0, 2, 3, 4, 6}
    assert pixels(run / "curves.png").std() > 10
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["memorized_at"]) == 3 and 0 < summary["scoring_share"] < 1
    assert len(summary["score"]["train"]["excluded_by_timestep_second_half"]) == 10


def test_a_row_is_appended_and_a_new_column_keeps_the_rows_before_it(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(str(tmp_path))
    logger.log_metrics({"a": 0.1, "b/c": 1 / 3}, step=1)
    before = os.stat(path).st_ino
    logger.log_metrics({"b/c": 2.0}, step=2)
    assert os.stat(path).st_ino == before  # appended: the same file
    logger.log_metrics({"new": 5.0, "a": 0.3}, step=3)
    expected = {"a": ([1, 3], [0.1, 0.3]), "b/c": ([1, 2], [1 / 3, 2.0]), "new": ([3], [5.0])}
    assert read_metrics(path) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_run_that_goes_on_in_its_folder_keeps_the_rows_before_and_drops_stale_ones(tmp_path):
    first = MetricsFile(str(tmp_path))
    for step in (2, 4, 6):
        first.log_metrics({"a": step / 10}, step=step)
    again = MetricsFile(str(tmp_path))  # from a checkpoint at step 2
    again.log_metrics({"a": 9.0, "z": 1.0}, step=4)
    again.log_metrics({"a": 8.0}, step=6)
    assert read_metrics(tmp_path / "metrics.csv") == {"a": ([2, 4, 6], [0.2, 9.0, 8.0]), "z": ([4], [1.0])}


def test_names_begin_with_their_section_and_the_longest_word_decides():
    assert dashboard_name("samples_seen") == "samples_seen"
    assert dashboard_name("samples_per_second") == "h_speed/samples_per_second"
    assert dashboard_name("samples") == "g_pictures/samples"
    assert dashboard_name("score_by_timestep/train/t300") == "e_by_timestep/score_by_timestep/train/t300"
    assert dashboard_name("mine") == "i_other/mine"
