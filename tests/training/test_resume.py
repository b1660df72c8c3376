"""Runs that are killed, and runs that go on with another number of ranks, see what the uninterrupted run sees."""

import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from memtrain.callbacks.checkpoint import checkpoint
from tests.conftest import build_data, build_module, fit

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24

# Trains with `ranks` processes until `steps`, from the checkpoint in `folder` if there is one, and writes what
# each step saw. Forks a child for each line that it reads, so that the imports are paid for once.
TRAIN = """
import json, os, sys
sys.path.insert(0, {root!r})
import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from memtrain.callbacks.checkpoint import checkpoint
from tests.conftest import build_data, build_module, fit
from tests.training.test_module import quick_evidence

class Record(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        observed = pl_module.step_observed
        row = dict(step=trainer.global_step, place=batch.place.tolist(), index=batch.sample_index.tolist(),
            loss=observed.loss.tolist(), score=observed.score.tolist())
        with open({folder!r} + f"/seen-{{os.getpid()}}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\\n")

def train(workers, ranks, steps):
    last = {folder!r} + "/last.ckpt"
    module = build_module({pipeline!r}, quick_evidence())
    data = build_data({corpus!r}, 4 // ranks, workers, crop="random", flip=0.5)
    callbacks = [Record(), checkpoint(5, {folder!r})]
    options = dict(accelerator="cpu", devices=ranks, max_steps=steps, max_epochs=-1, callbacks=callbacks, logger=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, gradient_clip_val=1.0,
        num_sanity_val_steps=0, default_root_dir={folder!r})
    if ranks > 1:
        options["strategy"] = DDPStrategy(process_group_backend="gloo")
    pl.Trainer(**options).fit(module, data, ckpt_path=last if os.path.exists(last) else None, weights_only=True)

if len(sys.argv) > 1:
    train(*map(int, sys.argv[1:]))
else:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            train(*map(int, line.split()))
            sys.stdout.flush()
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
"""


def script(tmp_path, pipeline, corpus) -> list[str]:
    path = tmp_path / "train.py"
    text = TRAIN.format(root=str(ROOT), folder=str(tmp_path), pipeline=str(pipeline), corpus=str(corpus))
    path.write_text(text)
    return [sys.executable, str(path)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


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
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_at_random_steps_sees_what_the_uninterrupted_run_sees(pipeline_folder, corpus, tmp_path, workers):
    """SIGKILL ten times with each number of workers; bit for bit."""
    generator = random.Random(workers)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
    subprocess.run(
        [*script(whole, pipeline_folder, corpus), "0", "1", str(STEPS)], check=True, env=environment(), timeout=300
    )
    zygote = subprocess.Popen(
        script(killed, pipeline_folder, corpus),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    with zygote:
        for kill in [*sorted(generator.sample(range(1, STEPS), 10)), None]:
            zygote.stdin.write(f"{workers} 1 {STEPS}\n")
            zygote.stdin.flush()
            child = int(zygote.stdout.readline())
            log = killed / f"seen-{child}.jsonl"
            while kill is not None and not (log.exists() and f'"step": {kill},' in log.read_text()):
                assert Path(f"/proc/{child}").exists()
            if kill is not None:
                os.kill(child, 9)
            assert int(zygote.stdout.readline()) == (9 if kill is not None else 0)
        zygote.stdin.close()
    expected, found = seen(whole), seen(killed)
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    assert len(list(killed.glob("seen-*.jsonl"))) == 11
    assert found == expected  # one account of each step, however often it was made


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(pipeline_folder, corpus, tmp_path, first, then):
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    for folder in (whole, changed):
        folder.mkdir()
    subprocess.run(
        [*script(whole, pipeline_folder, corpus), "0", "1", "12"], check=True, env=environment(), timeout=300
    )
    for ranks, steps in ((first, 5), (then, 12)):
        command = [*script(changed, pipeline_folder, corpus), "0", str(ranks), str(steps)]
        subprocess.run(command, check=True, env=environment(), timeout=300)

    def merged(folder):
        return {step: sorted(row for account in accounts for row in account) for step, accounts in seen(folder).items()}

    expected, found = merged(whole), merged(changed)
    assert sorted(found) == list(range(1, 13))
    for step, rows in expected.items():
        assert [row[:2] for row in found[step]] == [row[:2] for row in rows]  # the same samples in the same places
        for ours, theirs in zip(found[step], rows, strict=True):
            assert ours[2:] == pytest.approx(theirs[2:], abs=1e-5)


def test_resuming_at_another_batch_size_goes_on_in_the_order(pipeline_folder, corpus, tmp_path):
    data = build_data(corpus, 4)
    fit(build_module(pipeline_folder), data, tmp_path, 3, callbacks=[checkpoint(3, str(tmp_path))])
    smaller = build_data(corpus, 2)
    callbacks = [checkpoint(3, str(tmp_path))]
    fit(build_module(pipeline_folder), smaller, tmp_path, 5, callbacks=callbacks, ckpt_path=str(tmp_path / "last.ckpt"))
    assert data.consumed() == 12 and smaller.consumed() == 16
