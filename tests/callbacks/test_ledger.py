"""The ledger holds what was observed, once, whatever becomes of the run."""

import math

import pytest
import pytorch_lightning as pl

from memtrain.callbacks.ledger import Ledger
from memtrain.core.exclusion import GROUP_NAMES, Decision, ExclusionRule, FixedThreshold
from memtrain.core.streams import Stream, place_seed
from memtrain.data.ledger import SCHEMA, read_about, read_ledger
from memtrain.training.checkpoint import checkpoint
from memtrain.training.score_memory import Scoring
from tests.conftest import build_data, build_module, fit

THRESHOLD = 1.0  # keeps some


class Watch(pl.Callback):
    """What the module says of each step, as rows of the ledger."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == getattr(self, "last", 0):
            return
        self.last = trainer.global_step
        key = trainer.datamodule.samples.key
        assert pl_module.last_step.step == self.last - 1
        for rows in pl_module.last_step.groups:
            observed, kept, threshold = rows.observed, rows.decision.keep_mask, rows.decision.threshold
            for row in range(len(kept)):
                if observed.known[row] if pl_module.exclusion.needs_score else observed.captioned[row]:
                    index, picture = int(observed.sample_index[row]), int(observed.picture[row])
                    self.rows.append(
                        {
                            "step": self.last - 1,
                            "key": key(index),
                            "duplicate_of": key(picture) if picture != index else None,
                            "group": GROUP_NAMES[observed.group[row]],
                            "timestep": int(observed.timesteps[row]),
                            "score": observed.score[row].item() if observed.scored[row] else None,
                            "loss": observed.loss[row].item(),
                            "threshold": threshold[row].item(),
                            "kept": bool(kept[row]),
                        }
                    )


def rows(run) -> list[dict]:
    return ordered(read_ledger(run).to_table().to_pylist())


def ordered(found: list[dict]) -> list[dict]:
    return sorted(found, key=lambda row: (row["step"], row["key"], row["timestep"], row["loss"]))


def train(
    pipeline,
    corpus,
    run,
    steps,
    every=100,
    ckpt_path=None,
    ledger=None,
    callbacks=(),
    accumulate=1,
    **options,
):
    watch, module = Watch(), build_module(pipeline, options.pop("rule", FixedThreshold(THRESHOLD)), **options)
    callbacks = [ledger or Ledger(1.0, 7), watch, checkpoint(every, str(run / "checkpoints")), *callbacks]
    fit(
        module,
        build_data(corpus),
        run,
        steps,
        callbacks=callbacks,
        ckpt_path=ckpt_path,
        accumulate=accumulate,
    )
    return watch.rows


def last(run):
    return str(run / "checkpoints" / "last.ckpt")


def test_the_ledger_is_what_was_observed(pipeline_folder, corpus, tmp_path):
    observed = train(pipeline_folder, corpus, tmp_path, 6, every=4, accumulate=2)
    assert read_ledger(tmp_path).schema.equals(SCHEMA)
    assert rows(tmp_path) == ordered(observed)
    table = read_ledger(tmp_path).to_table()
    assert {"train", "canary", "reference"} == set(table["group"].to_pylist())
    assert {True, False} == set(table["kept"].to_pylist()) and set(table["step"].to_pylist()) == set(range(6))
    assert read_about(tmp_path).num_timesteps == 1000 and read_about(tmp_path).sample == 1
    parts = sorted(path.name for path in (tmp_path / "ledger").iterdir())
    assert parts == [
        "rank0-000001.parquet",
        "rank0-000002.parquet",
    ]  # at step 4 and at the end; nothing beside


def test_visits_that_were_not_scored_have_no_score(pipeline_folder, corpus, tmp_path):
    observed = train(pipeline_folder, corpus, tmp_path, 8, scoring=Scoring(every_visits=2))
    found = rows(tmp_path)
    assert found == ordered(observed)
    assert 0 < sum(row["score"] is None for row in found) < len(found)


class LowLoss(ExclusionRule):
    needs_score = False

    def decide(self, observed):
        return Decision(observed.loss > 1.0, observed.loss * 0 + 1.0)


def test_a_rule_without_scores_has_a_ledger_too(pipeline_folder, corpus, tmp_path):
    observed = train(pipeline_folder, corpus, tmp_path, 3, rule=LowLoss(), scoring=Scoring(every=0))
    found = rows(tmp_path)
    assert found == ordered(observed) and len(found) > 6
    assert all(row["score"] is None and row["threshold"] == 1 for row in found)


class Stop(pl.Callback):
    """Breaks off where nothing can be saved any more, as SIGKILL does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.callbacks = [self]
            raise RuntimeError("killed")


@pytest.mark.parametrize("saved", [3, 4])  # two steps before, or one
def test_after_a_kill_no_row_is_doubled_or_lost(pipeline_folder, corpus, tmp_path, saved):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(pipeline_folder, corpus, whole, 6)
    ledger = Ledger(1.0, 7)
    with pytest.raises(RuntimeError, match="killed"):
        train(pipeline_folder, corpus, killed, 6, saved, ledger=ledger, callbacks=[Stop(5)])
    ledger.writer.close_part()  # rows past the checkpoint on disk, too
    (killed / "ledger" / ".rank0-000009.parquet").write_bytes(b"half a part")
    train(pipeline_folder, corpus, killed, 6, saved, ckpt_path=last(killed))
    assert rows(killed) == rows(whole)
    assert all(path.name.startswith("rank0-") for path in (killed / "ledger").iterdir())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # of the checkpoints: meant
def test_a_run_that_goes_on_elsewhere_takes_the_ledger_along(pipeline_folder, corpus, tmp_path):
    whole, first, second, moved = (tmp_path / name for name in ("whole", "first", "second", "moved"))
    train(pipeline_folder, corpus, whole, 4)
    train(pipeline_folder, corpus, first, 3, every=3)
    before = rows(first)
    for _ in range(2):  # the second time into a folder with a past of its own
        train(pipeline_folder, corpus, second, 4, 3, ckpt_path=last(first))
        assert rows(second) == rows(whole)
    assert rows(first) == before
    first.rename(moved)
    train(pipeline_folder, corpus, tmp_path / "third", 4, 3, ckpt_path=last(moved))
    assert rows(tmp_path / "third") == rows(whole)


def test_a_run_from_the_start_keeps_no_rows_of_an_earlier_one(pipeline_folder, corpus, tmp_path):
    train(pipeline_folder, corpus, tmp_path, 4)
    observed = train(pipeline_folder, corpus, tmp_path, 2)
    assert rows(tmp_path) == ordered(observed)


def test_a_ledger_that_is_missing_is_said(pipeline_folder, corpus, tmp_path, caplog):
    train(pipeline_folder, corpus, tmp_path, 3, every=3)
    for part in (tmp_path / "ledger").iterdir():
        part.unlink()
    train(pipeline_folder, corpus, tmp_path, 4, 3, ckpt_path=last(tmp_path))
    assert "the ledger begins at step 3" in caplog.text
    assert {row["step"] for row in rows(tmp_path)} == {3}


def test_what_broke_off_before_a_checkpoint_is_written_all_the_same(pipeline_folder, corpus, tmp_path):
    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer, *rest):
            if trainer.global_step == 3:
                raise RuntimeError("a callback's")

    for order in (0, 1):  # before the ledger has seen the step, and after
        callbacks = [Ledger(1.0, 7)]
        callbacks.insert(order, Fail())
        run = tmp_path / str(order)
        with pytest.raises(RuntimeError, match="a callback's"):
            fit(build_module(pipeline_folder), build_data(corpus), run, 5, callbacks=callbacks)
        assert {row["step"] for row in rows(run)} == {0, 1, 2}


def test_a_sample_of_the_rows_is_drawn_by_step_and_sample(pipeline_folder, corpus, tmp_path):
    observed = train(pipeline_folder, corpus, tmp_path, 12, ledger=Ledger(0.3, 7))
    samples = build_data(corpus).samples
    position = {samples.key(index): index for index in range(len(samples))}
    chosen = [row for row in observed if place_seed(7, Stream.LEDGER, row["step"], position[row["key"]]) < 0.3 * 2**63]
    assert rows(tmp_path) == ordered(chosen) and 0.15 < len(chosen) / len(observed) < 0.45
    assert read_about(tmp_path).sample == 0.3


def test_training_is_the_same_with_a_ledger(pipeline_folder, corpus, tmp_path):
    from tests.conftest import weights

    plain, watched = build_module(pipeline_folder), build_module(pipeline_folder)
    fit(plain, build_data(corpus), tmp_path, 2)
    fit(watched, build_data(corpus), tmp_path, 2, callbacks=[Ledger(1.0, 7)])
    assert (weights(plain) == weights(watched)).all()


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
def test_a_wrong_share_is_named(share):
    with pytest.raises(ValueError, match=r"ledger\.sample is a share in \(0, 1\].*ledger=off"):
        Ledger(share, 7)


# ---- two ranks and one


def train_part(pipeline: str, corpus: str, run: str, ranks: int, steps: int, ckpt_path: str | None = None) -> None:
    module = build_module(pipeline, FixedThreshold(THRESHOLD))
    callbacks = [Ledger(1.0, 7), checkpoint(3, f"{run}/checkpoints")]
    fit(module, build_data(corpus, 4 // ranks), run, steps, callbacks=callbacks, ckpt_path=ckpt_path, ranks=ranks)


def train_a_rank(pipeline: str, corpus: str, two: str, changed: str) -> None:
    train_part(pipeline, corpus, two, 2, 6)
    train_part(pipeline, corpus, changed, 2, 4)


@pytest.mark.slow
def test_two_ranks_and_one_have_the_same_rows(forks, pipeline_folder, corpus, tmp_path):
    """Begun on two and gone on with on one, past a step that both have made, too."""
    one, two, changed = (tmp_path / name for name in ("one", "two", "changed"))
    forks.call(train_a_rank, pipeline_folder, corpus, two, changed, log=tmp_path / "log", ranks=2)
    train_part(pipeline_folder, corpus, one, 1, 6)
    train_part(pipeline_folder, corpus, changed, 1, 6, last(changed))
    expected = rows(one)
    exact = ("step", "key", "group", "timestep", "threshold", "kept")
    for run in (two, changed):
        found = rows(run)
        assert [[row[name] for name in exact] for row in found] == [[row[name] for name in exact] for row in expected]
        for name in ("score", "loss"):
            assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-4)
    assert {path.name[:5] for path in (two / "ledger").iterdir()} == {"rank0", "rank1"}
