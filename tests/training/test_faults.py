"""Real faults: each ends in words, within seconds, and loses nothing before the last checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from memtrain.callbacks.ledger import Ledger
from memtrain.cli.main import main
from memtrain.data import open_shards
from memtrain.data.ledger import read_ledger
from memtrain.demo.compose import write_corpus
from memtrain.training.checkpoint import checkpoint
from memtrain.training.checks import check_accelerator
from memtrain.training.resume import RunState, checkpoints_in, damage, differences, find_run, whole_checkpoint
from tests.conftest import build_data, build_module, fit, weights
from tests.support.forks import ROOT, ended, wait_until
from tests.support.program import small_run
from tests.support.rules import quick_evidence
from tests.support.training import Poison, Record


@pytest.fixture
def run(corpus, pipeline_folder, tmp_path):
    """Arguments of a small run in tmp_path/faults/one."""
    return lambda *more, steps=12: small_run(corpus, pipeline_folder, tmp_path, "run_id=one", *more, steps=steps)


def saved(folder: Path) -> list[int]:
    return list(checkpoints_in(folder / "faults" / "one" / "checkpoints"))


def visits(folder: Path) -> list[tuple]:
    """Who was seen when: the ledger's rows but for the figures."""
    rows = read_ledger(folder / "faults" / "one").to_table(columns=["step", "key", "timestep"])
    return sorted(zip(*rows.to_pydict().values(), strict=True))


def train(
    pipeline, corpus, folder, steps, accumulate=1, batch_size=4, every=4, callbacks=(), ckpt_path=None, **options
):
    module = build_module(pipeline, quick_evidence(), **options)
    callbacks = [*callbacks, checkpoint(every, str(folder / "checkpoints"))]
    fit(module, build_data(corpus, batch_size), folder, steps, accumulate, callbacks=callbacks, ckpt_path=ckpt_path)
    return module


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
        time.sleep(4)  # what comes sooner may count as the same signal
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
    write_corpus(corpus, num_samples=40, seed=3, shard_size=1, progress=False)

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


# ---- checkpoints


@pytest.mark.slow
def test_a_damaged_checkpoint_and_a_changed_config(forks, run, tmp_path):
    codes, said = forks.run(run(), tmp_path / "log")
    folder = tmp_path / "faults" / "one" / "checkpoints"
    assert codes == [0] and saved(tmp_path) == [8, 12] and (folder / "last.ckpt").resolve().name == "step-00000012.ckpt"
    codes, said = forks.run(run("resume=auto", "optimizer.lr=1e-5", steps=14), tmp_path / "changed")
    assert codes == [2]
    assert "optimizer.lr 0.0015 -> 1e-05" in said and "trainer.max_steps 12 -> 14" in said
    assert "resume.allow=all" in said and said.count("error:") == 1
    newest = folder / "step-00000012.ckpt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    codes, said = forks.run(run("resume=auto", "resume.allow=[trainer.max_steps]", steps=14), tmp_path / "damaged")
    assert codes == [0], said
    assert f"DAMAGED CHECKPOINT {newest}" in said and f"going back to {folder}/step-00000008.ckpt" in said
    assert saved(tmp_path) == [12, 14] and damage(newest) is None  # made again


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_wandb_id(forks, run, tmp_path):
    folder, ids = tmp_path / "faults" / "one", []
    for steps in (4, 6):
        words = run("logger=wandb", "resume=auto", "resume.allow=all", steps=steps)
        codes, said = forks.run(words, tmp_path / "log", WANDB_SERVICE="")  # each with a W&B process of its own
        assert codes == [0], said
        newest = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        ids += [newest["callbacks"]["Checkpoints"]["wandb_id"], RunState.read(folder).wandb_id]
    ids += [path.name.rsplit("-", 1)[1] for path in (folder / "wandb").glob("offline-run-*")]
    assert len(set(ids)) == 1 and len(ids) == 6, ids


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(forks, run, tmp_path):
    assert forks.run(run(steps=4), tmp_path / "log")[0] == [0]
    more = ("resume=auto", "resume.allow=all")
    codes, said = forks.run(run(*more, steps=8), tmp_path / "full", file_size=200_000)
    assert codes == [2] and "the checkpoint could not be written" in said and said.count("error:") == 1
    folder = tmp_path / "faults" / "one" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step-00000004.ckpt"]
    codes, said = forks.run(run(*more, steps=8), tmp_path / "space")
    assert codes == [0] and saved(tmp_path) == [4, 8], said


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 96 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "memtrain", folder], capture_output=True)
    if mounting.returncode:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 4096, 400_000])
def test_a_disk_that_fills_up_ends_a_run_in_one_line_and_it_goes_on_when_there_is_space(
    forks, corpus, pipeline_folder, small_disk, tmp_path, left
):
    """Log, curves, ledger or checkpoint: `left` bytes decide which of them is the first that does not fit."""

    def run(steps, *more):
        return small_run(corpus, pipeline_folder, small_disk, "run_id=one", *more, steps=steps)

    forks.start(run(5000), tmp_path / "full")
    forks.wait_until(lambda: 8 in saved(small_disk))
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        space = os.statvfs(small_disk)
        file.write(bytes(space.f_bavail * space.f_frsize - left))
    codes, said = forks.wait(), forks.said()
    assert codes == [2] and said.count("error:") == 1 and "space" in said and "Traceback" not in said, said
    filler.unlink()
    reached = saved(small_disk)[-1]
    assert reached >= 8 and all(
        damage(path) is None for path in checkpoints_in(small_disk / "faults/one/checkpoints").values()
    )
    codes, said = forks.run(run(reached + 4, "resume=auto", "resume.allow=all"), tmp_path / "space")
    assert codes == [0] and saved(small_disk)[-1] == reached + 4, said
    undisturbed = small_run(corpus, pipeline_folder, tmp_path, "run_id=one", steps=reached + 4)
    assert forks.run(undisturbed, tmp_path / "undisturbed")[0] == [0]
    assert visits(small_disk) == visits(tmp_path)


def test_every_damage_is_found_and_a_checkpoint_holds_every_part(pipeline_folder, corpus, tmp_path):
    train(pipeline_folder, corpus, tmp_path, 3, every=1)
    folder = tmp_path / "checkpoints"
    assert list(checkpoints_in(folder)) == [2, 3]
    newest = folder / "step-00000003.ckpt"
    whole = newest.read_bytes()
    for spoilt in (
        whole[:-100],
        whole[: len(whole) // 2],
        b"",
        b"x" * 1000,
        whole[:5000] + bytes(5000) + whole[10000:],
    ):
        newest.write_bytes(spoilt)
        assert damage(newest) is not None
    assert whole_checkpoint(folder / "last.ckpt").name == "step-00000002.ckpt"
    state = torch.load(folder / "step-00000002.ckpt", weights_only=True)
    assert state["optimizer_states"] and state["DataModule"] == {"samples_consumed": 8}
    assert set(state["memtrain"]) >= {"exclusion", "scores", "ema", "samples_seen", "bad_steps"}
    assert set(state["callbacks"]["Checkpoints"]) == {"wandb_id", "random"}
    del state["memtrain"]
    torch.save(state, newest)
    assert damage(newest) == "it lacks memtrain"
    (folder / "step-00000002.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged, and there is no older checkpoint"):
        whole_checkpoint(folder / "last.ckpt")


def test_the_random_state_goes_on(pipeline_folder, corpus, tmp_path):
    class Draw(pl.Callback):
        def __init__(self):
            self.drawn = []

        def on_train_batch_end(self, *_):
            self.drawn.append(torch.rand(1).item())

    whole, first, rest = Draw(), Draw(), Draw()
    for folder, draw, steps in (("whole", whole, 4), ("cut", first, 2)):
        torch.manual_seed(5)
        train(pipeline_folder, corpus, tmp_path / folder, steps, every=2, callbacks=[draw])
    train(
        pipeline_folder,
        corpus,
        tmp_path / "cut",
        4,
        every=2,
        callbacks=[rest],
        ckpt_path=str(tmp_path / "cut/checkpoints/last.ckpt"),
    )
    assert whole.drawn == first.drawn + rest.drawn


class Break(pl.Callback):
    """Breaks off in the middle of an optimizer step, or at the end of a run."""

    def __init__(self, micro_batch=None):
        self.micro_batch = micro_batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.micro_batch:
            raise RuntimeError("broken off")

    def on_train_end(self, trainer, pl_module):
        raise RuntimeError("broken off")


def test_what_breaks_off_in_a_window_goes_on_with_a_whole_one(pipeline_folder, corpus, tmp_path):
    """And with other micro-batches of the same global batch."""
    record = Record()
    whole = train(pipeline_folder, corpus, tmp_path / "whole", 6, 2, 2, callbacks=[record])
    with pytest.raises(RuntimeError, match="broken off"):
        train(pipeline_folder, corpus, tmp_path / "cut", 6, 2, 2, callbacks=[Break(6)])  # one of two
    assert list(checkpoints_in(tmp_path / "cut" / "checkpoints")) == [3]
    last = str(tmp_path / "cut" / "checkpoints" / "last.ckpt")
    for accumulate, batch_size in ((2, 2), (4, 1), (1, 4)):
        seen = Record()
        folder = tmp_path / f"rest{accumulate}"
        rest = train(pipeline_folder, corpus, folder, 6, accumulate, batch_size, callbacks=[seen], ckpt_path=last)
        assert [i for batch in seen.keys for i in batch] == [i for batch in record.keys[6:] for i in batch]
        assert rest.global_step == 6 and rest.accumulation.samples_seen == whole.accumulation.samples_seen
        torch.testing.assert_close(weights(rest), weights(whole), atol=1e-5, rtol=0)


def test_a_run_that_is_stopped_at_its_end_is_ended(pipeline_folder, corpus, tmp_path):
    with pytest.raises(RuntimeError, match="broken off"):
        train(pipeline_folder, corpus, tmp_path, 4, callbacks=[Break()])
    assert RunState.read(tmp_path).finished_at is None
    ends = []

    class End(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            ends.append(trainer.global_step)

    last = str(tmp_path / "checkpoints" / "last.ckpt")
    train(pipeline_folder, corpus, tmp_path, 4, callbacks=[End(), Ledger(1.0, 7)], ckpt_path=last)
    assert ends == [4] and RunState.read(tmp_path).finished_at == 4


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


# ---- W&B


_WANDB = """
import http.server, json, os, sys, threading, time
sys.path.insert(0, {root!r})
import logging
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from memtrain.callbacks import logging as loggers
loggers.INIT_PATIENCE, loggers.FINISH_PATIENCE = {patience}, 4.0

RUN = dict(id="UnVuOjE=", name="abc", displayName="n", description=None, config="{{}}", sweepName=None,
    historyLineCount=0, project=dict(id="UDox", name="p", entity=dict(id="RTox", name="e")))

class Answer(http.server.BaseHTTPRequestHandler):  # what W&B says to a run that begins
    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        viewer = dict(id="x", entity="e", username="u", flags="{{}}", teams=dict(edges=[]))
        said = json.dumps(dict(data=dict(viewer=viewer, upsertBucket=dict(bucket=RUN, inserted=True)))).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    do_GET = do_PUT = do_POST
    def log_message(self, *_): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
os.environ.update(WANDB_BASE_URL=f"http://127.0.0.1:{{server.server_port}}", WANDB_API_KEY="a" * 40)
if {answers}:
    threading.Thread(target=server.serve_forever, daemon=True).start()
else:
    server.server_close()
logger = loggers.wandb_logger("p", "online", "n", {folder!r})
if {answers}:
    server.shutdown(), server.server_close()
for step in range(5):
    logger.log_metrics(dict(loss=0.25), step=step)
logger.experiment.finish()
print("finished")
"""


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, True])
def test_a_dead_wandb_stops_nothing_and_loses_nothing(tmp_path, answers):
    """Never there, or gone after the run has begun."""
    patience = 20.0 if answers else 2.0
    script = _WANDB.format(root=str(ROOT), folder=str(tmp_path), answers=answers, patience=patience)
    with (tmp_path / "said").open("w") as out:  # no pipe: W&B's own process holds it open for longer
        done = subprocess.run([sys.executable, "-c", script], stdout=out, stderr=out, timeout=1200)
    said = (tmp_path / "said").read_text()
    assert done.returncode == 0 and "finished" in said, said
    assert ("W&B cannot be reached" in said) != answers
    (folder,) = (tmp_path / "wandb").glob("run-*" if answers else "offline-run-*")
    (file,) = folder.glob("*.wandb")
    inspect = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", file]

    def is_whole() -> bool:  # W&B's own process may outlive ours, and writes the end of the file when it goes
        return subprocess.run(inspect, capture_output=True, text=True, timeout=1200).stdout.count("0.25") >= 5

    wait_until(is_whole)
