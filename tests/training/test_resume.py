"""Runs that are killed, and runs that go on with another number of ranks, see what the uninterrupted run sees."""

import json
import os
import signal
from collections import defaultdict
from pathlib import Path

import pytest
import pytorch_lightning as pl

from memtrain.training.checkpoint import checkpoint
from tests.conftest import build_data, build_module, fit
from tests.support.rules import quick_evidence

STEPS = 14


class Account(pl.Callback):
    """Writes down what each step saw, in a file of this process."""

    def __init__(self, folder: str):
        self.file = Path(folder, f"seen-{os.getpid()}.jsonl")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        observed = pl_module.last_step.trained.observed
        row = dict(step=trainer.global_step, place=batch.place.tolist(), index=batch.sample_index.tolist())
        row |= dict(loss=observed.loss.tolist(), score=observed.score.tolist())
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def train(pipeline: str, corpus: str, folder: str, steps: int, workers: int, ranks: int) -> None:
    """Until `steps`, from the checkpoint in `folder` if there is one."""
    last = Path(folder, "last.ckpt")
    data = build_data(corpus, 4 // ranks, workers, crop="random", flip=0.5)
    callbacks = [Account(folder), checkpoint(5, folder)]
    start = str(last) if last.exists() else None
    fit(
        build_module(pipeline, quick_evidence()), data, folder, steps, callbacks=callbacks, ckpt_path=start, ranks=ranks
    )


@pytest.fixture(scope="module")
def expected(forks, pipeline_folder, corpus, tmp_path_factory) -> dict[int, set]:
    """What the uninterrupted run sees."""
    whole = tmp_path_factory.mktemp("whole")
    forks.call(train, pipeline_folder, corpus, whole, STEPS, 0, 1, log=whole / "log")
    return seen(whole)


def seen(folder: Path) -> dict[int, set]:
    """step -> every different account of it: (place, sample, loss, score) in order of place."""
    rows = defaultdict(list)  # of one step, as each process saw them
    for file in sorted(folder.glob("seen-*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            rows[row["step"]].append(
                (file.name, tuple(zip(*(row[k] for k in ("place", "index", "loss", "score")), strict=True)))
            )
    return {step: {account for _, account in accounts} for step, accounts in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(0, [8]), (2, [3, 12])])
def test_a_run_that_is_killed_sees_what_the_uninterrupted_run_sees(
    forks, expected, pipeline_folder, corpus, tmp_path, workers, kills
):
    """SIGKILL after these steps, before and after the first checkpoint; bit for bit."""
    arguments = [str(pipeline_folder), str(corpus), str(tmp_path), STEPS, workers, 1]
    for kill in [*kills, None]:
        [child] = forks.start(arguments, tmp_path / "log", function=train)
        log = tmp_path / f"seen-{child}.jsonl"
        if kill is not None:
            forks.wait_until(lambda log=log, kill=kill: log.exists() and f'"step": {kill},' in log.read_text())
            os.kill(child, signal.SIGKILL)
        assert forks.wait() == [-signal.SIGKILL if kill else 0], forks.said()
    found = seen(tmp_path)
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    assert len(list(tmp_path.glob("seen-*.jsonl"))) == len(kills) + 1
    assert found == expected  # one account of each step, however often it was made


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(forks, expected, pipeline_folder, corpus, tmp_path, first, then):
    for ranks, steps in ((first, 5), (then, 12)):
        forks.call(train, pipeline_folder, corpus, tmp_path, steps, 0, ranks, log=tmp_path / "log", ranks=ranks)

    def merged(accounts_of):
        return {step: sorted(row for account in accounts for row in account) for step, accounts in accounts_of.items()}

    whole, found = merged(expected), merged(seen(tmp_path))
    assert sorted(found) == list(range(1, 13))
    for step, rows in found.items():
        assert [row[:2] for row in rows] == [row[:2] for row in whole[step]]  # the same samples in the same places
        for ours, theirs in zip(rows, whole[step], strict=True):
            assert ours[2:] == pytest.approx(theirs[2:], abs=1e-5)


def test_resuming_at_another_batch_size_goes_on_in_the_order(pipeline_folder, corpus, tmp_path):
    data = build_data(corpus, 4)
    fit(build_module(pipeline_folder), data, tmp_path, 3, callbacks=[checkpoint(3, str(tmp_path))])
    smaller = build_data(corpus, 2)
    callbacks = [checkpoint(3, str(tmp_path))]
    fit(build_module(pipeline_folder), smaller, tmp_path, 5, callbacks=callbacks, ckpt_path=str(tmp_path / "last.ckpt"))
    assert data.consumed() == 12 and smaller.consumed() == 16
