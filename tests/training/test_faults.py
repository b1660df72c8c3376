"""Real faults: each ends in words, within seconds, and loses nothing before the last checkpoint."""

import os
import signal
import time

import pytest
import torch

from memtrain.callbacks.ledger import Ledger
from memtrain.cli.main import main
from memtrain.data import open_shards
from memtrain.data.ledger import read_ledger
from memtrain.demo.corpus import recipe_of
from memtrain.demo.shards import write_corpus
from memtrain.training.checkpoint import checkpoint
from memtrain.training.checks import check_accelerator
from memtrain.training.resume import RunState, checkpoints_in, damage, differences, find_run
from tests.conftest import build_data, build_module, fit, weights
from tests.support.forks import ended, wait_until
from tests.support.observe import observe
from tests.support.program import saved, small_run
from tests.support.rules import quick_evidence
from tests.support.training import Poison, Record, train

# ---- signals


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_the_step_with_a_checkpoint(forks, run, tmp_path, number, code):
    [process] = forks.start(run(steps=5000), tmp_path / "log")
    forks.wait_until(lambda: saved(tmp_path))
    os.kill(process, number)
    assert forks.wait() == [code], forks.said()
    assert f"{number.name}: this step is finished" in forks.said()
    assert f"stopped after step {saved(tmp_path)[-1]}" in forks.said()
    folder = tmp_path / "faults" / "one"
    assert set(read_ledger(folder).to_table()["step"].to_pylist()) == set(range(saved(tmp_path)[-1]))


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_at_the_same_step_and_the_run_goes_on(forks, run, tmp_path):
    _, second = forks.start(run("data.batch_size=2", steps=5000), tmp_path / "log", ranks=2)
    forks.wait_until(lambda: saved(tmp_path))
    os.kill(second, signal.SIGUSR1)
    assert forks.wait() == [75, 0], forks.said()  # the first says it for all
    stopped = saved(tmp_path)[-1]
    more = ["data.batch_size=2", "resume=auto", "resume.allow=all"]
    codes, said = forks.run(run(*more, steps=stopped + 2), tmp_path / "log", ranks=2)
    assert codes == [0, 0] and f"going on from {tmp_path}/faults/one/checkpoints/step-{stopped:08d}.ckpt" in said
    assert saved(tmp_path)[-1] == stopped + 2
    codes, said = forks.run(run(*more, steps=stopped + 2), tmp_path / "log", ranks=2)  # finished
    assert codes == [0, 0] and f"finished, at step {stopped + 2}: nothing to do" in said


@pytest.mark.slow
def test_a_second_signal_exits_at_once_out_of_a_collective_too(forks, run, tmp_path):
    first, second = forks.start(run("data.batch_size=2", steps=5000), tmp_path / "log", ranks=2)
    forks.wait_until(lambda: saved(tmp_path))
    os.kill(second, signal.SIGSTOP)  # the first waits for it, and no Python runs there
    time.sleep(0.5)

    def told_again() -> bool:
        os.kill(first, signal.SIGTERM)
        until = time.monotonic() + 1.5  # what comes sooner may count as the same signal
        while not ended(first) and time.monotonic() < until:
            time.sleep(0.05)
        return ended(first)

    wait_until(told_again)
    os.kill(second, signal.SIGKILL)
    assert forks.wait() == [143, -9]


@pytest.mark.slow
def test_a_rank_that_dies_is_said_by_the_others(forks, run, tmp_path):
    processes = forks.start(run("data.batch_size=2", steps=5000), tmp_path / "log", ranks=2)
    forks.wait_until(lambda: saved(tmp_path))
    os.kill(processes[1], signal.SIGKILL)
    assert forks.wait() == [2, -9]
    assert "error: rank 0 lost another rank after step" in forks.said()
    assert all(damage(path) is None for path in checkpoints_in(tmp_path / "faults" / "one" / "checkpoints").values())


def main_with_few_open_shards(*argv: str) -> None:
    open_shards._OPEN_SHARDS = 8
    main(list(argv))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_gone_for_one_rank_ends_all_with_a_checkpoint_and_the_run_goes_on(
    forks, pipeline_folder, tmp_path, workers
):
    """More shards than a process keeps open; a rank still reads what it has open, the other cannot open it."""
    corpus = tmp_path / "corpus"
    write_corpus(corpus, recipe_of(40, seed=3, shard_size=1, pictures="noto"), progress=False)

    def run(name, steps, *more):
        options = (f"run_id={name}", f"data.num_workers={workers}", "data.mix_shards=40", *more)
        return small_run(corpus, pipeline_folder, tmp_path, *options, "callbacks.checkpoint.every=3", steps=steps)

    def checkpoints():
        return list(checkpoints_in(tmp_path / "faults" / "one" / "checkpoints"))

    argv = run("one", 5000, "data.batch_size=2")
    forks.start(argv, tmp_path / "log", ranks=2, function=main_with_few_open_shards)
    forks.wait_until(checkpoints)
    (corpus / "00017.tar").rename(tmp_path / "00017.tar")
    assert forks.wait() == [2, 2], forks.said()
    for rank in (0, 1):  # both name it
        [error] = [line for line in forks.said(rank).splitlines() if line.startswith("error: ")]
        assert "00017.tar cannot be opened any more" in error and "put it back and resume" in error
    stopped = checkpoints()[-1]
    if not workers:  # what is saved is the same, and so is how it goes on
        return
    (tmp_path / "00017.tar").rename(corpus / "00017.tar")
    more = ("data.batch_size=2", "resume=auto", "resume.allow=all")
    codes, said = forks.run(run("one", stopped + 3, *more), tmp_path / "again", ranks=2)
    assert codes == [0, 0] and f"checkpoints/step-{stopped:08d}.ckpt" in said, said
    assert forks.run(run("whole", stopped + 3), tmp_path / "whole")[0] == [0]

    def seen(name):
        rows = read_ledger(tmp_path / "faults" / name).to_table(columns=["step", "key", "timestep"])
        return sorted(zip(*rows.to_pydict().values(), strict=True))

    assert seen("one") == seen("whole") and seen("one")[-1][0] == stopped + 2


@pytest.mark.slow
def test_another_number_of_ranks_keeps_the_global_batch_or_is_refused(forks, run, tmp_path):
    def go(*more, ranks, steps):
        words = run("resume=auto", "resume.allow=[trainer.max_steps]", *more, steps=steps)
        return forks.run(words, tmp_path / f"log-{steps}-{ranks}-{len(more)}", ranks=ranks)

    def consumed():
        newest = torch.load(tmp_path / "faults" / "one" / "checkpoints" / "last.ckpt", weights_only=True)
        return newest["DataModule"]["samples_consumed"]

    codes, said = forks.run(run(steps=2), tmp_path / "log", ranks=2)  # 2 x 4
    assert codes == [0, 0], said
    codes, said = go(ranks=1, steps=4)
    assert codes == [2] and said.count("error:") == 1
    assert "would be 4: 4 rows x 1 micro-batches x 1 ranks, and before it was 8" in said
    assert "data.batch_size=4 trainer.accumulate_grad_batches=2 " in said
    assert "resume.allow=[trainer.accumulate_grad_batches] keeps it" in said
    codes, said = forks.run(run("resume=auto", "resume.allow=all", steps=4), tmp_path / "all")
    assert codes == [2] and "data.batch_size=4 trainer.accumulate_grad_batches=2 keeps it" in said
    kept = ("trainer.accumulate_grad_batches=2", "resume.allow=[trainer.max_steps,trainer.accumulate_grad_batches]")
    codes, said = go(*kept, ranks=1, steps=4)
    assert codes == [0] and consumed() == 4 * 8, said
    fewer = ("data.batch_size=3", "trainer.accumulate_grad_batches=2")
    codes, said = go(*fewer, "resume.allow=[trainer.max_steps,data.batch_size]", ranks=1, steps=6)
    assert codes == [0] and "going on with a changed global batch: it is 6 now" in said, said
    assert consumed() == 4 * 8 + 2 * 6 and RunState.read(tmp_path / "faults" / "one").global_batch_size == 6


# ---- what is not finite


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(pipeline_folder, corpus, tmp_path, caplog):
    clean = train(pipeline_folder, corpus, tmp_path / "clean", 2)
    record = Record()
    module = build_module(pipeline_folder, quick_evidence(), method=Poison({4}))
    callbacks = [Ledger(1.0, 7), record, checkpoint(3, str(tmp_path / "a" / "checkpoints"))]
    data = build_data(corpus)
    fit(module, data, tmp_path / "a", 3, callbacks=callbacks)
    assert torch.equal(weights(module), weights(clean))  # two steps as if nothing were, the third none
    assert module.stops.bad_steps == 1 and module.accumulation.updates_skipped == 0 and module.global_step == 3
    assert data.samples.key(record.keys[2][0]) in caplog.text
    assert "step 2: a loss or gradient is not finite" in caplog.text
    assert all(value.isfinite().all() for value in module.exclusion.state_dict().values() if value.is_floating_point())
    table = read_ledger(tmp_path / "a").to_table().to_pylist()
    assert all(abs(row["loss"]) < 1e6 for row in table)
    rest = build_module(pipeline_folder, quick_evidence())
    callbacks = [Ledger(1.0, 7), checkpoint(3, str(tmp_path / "a" / "checkpoints"))]
    last = str(tmp_path / "a" / "checkpoints" / "last.ckpt")
    fit(rest, build_data(corpus), tmp_path / "a", 5, callbacks=callbacks, ckpt_path=last)
    assert rest.stops.bad_steps == 1 and weights(rest).isfinite().all()


def test_rows_are_blamed_by_their_losses_and_all_where_a_gradient_alone_is_not_finite(pipeline_folder, corpus):
    module, data = build_module(pipeline_folder), build_data(corpus)
    index = torch.tensor([3, 1, 2])
    module.accumulation._observed = [observe([1.0, 1.0, 1.0], index=index)]

    def blamed(suspect, told_by_losses):
        return module.accumulation._blamed(torch.tensor(suspect), data.samples, told_by_losses)

    keys = [data.samples.key(position) for position in index.tolist()]
    assert blamed([False, True, False], True) == [keys[1]]
    assert blamed([False] * 3, True) == []  # another rank's
    assert blamed([False] * 3, False) == keys


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_the_keys_on_all_ranks(forks, run, tmp_path):
    more = ("optimizer.lr=1e30", "optimizer.warmup_steps=0", "max_bad_steps=3", "data.batch_size=2", "ema.decay=0")
    codes, said = forks.run(run(*more, steps=5000), tmp_path / "log", ranks=2)
    assert codes == [2, 2], said
    assert "max_bad_steps=3" in said and ".tar/" in said and said.count("error:") == 1
    assert len(saved(tmp_path)) >= 1


# ---- before the first step


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing_is_said_in_one_line():
    with pytest.raises(ValueError, match=r"trainer\.accelerator=gpu: torch .* finds no GPU here.*use trainer=cpu"):
        check_accelerator("gpu", 1)
    check_accelerator("auto", 1)


def test_differences_are_of_what_matters():
    before = {"optimizer": {"lr": 1}, "run_dir": "a", "trainer": {"devices": 1, "max_steps": 5}, "logger": {"csv": {}}}
    now = {"optimizer": {"lr": 2}, "run_dir": "b", "trainer": {"devices": 8, "max_steps": 5}, "seed": 3}
    assert differences(before, now) == {"optimizer.lr": (1, 2), "seed": ("(absent)", 3)}


def test_a_folder_that_is_no_run_is_named(tmp_path):
    assert find_run(None, tmp_path) is None and find_run("auto", tmp_path) is None
    with pytest.raises(ValueError, match=r"resume=nowhere: no run"):
        find_run("nowhere", tmp_path)
