"""Checkpoints that are damaged, that do not fit on the disk, that a run goes on from: what was saved is there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from memtrain.callbacks.curves import MemorizationCurves
from memtrain.callbacks.ledger import Ledger
from memtrain.cli.main import main
from memtrain.data.ledger import read_ledger
from memtrain.training.resume import RunState, checkpoints_in, damage, whole_checkpoint
from tests.conftest import weights
from tests.support.program import fails, saved, small_run
from tests.support.training import Record, train


def visits(folder: Path, steps: int) -> list[tuple]:
    """Who was seen when in the first steps: the ledger's rows but for the figures."""
    rows = read_ledger(folder / "faults" / "one").to_table(columns=["step", "key", "timestep"])
    return sorted(row for row in zip(*rows.to_pydict().values(), strict=True) if row[0] < steps)


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
    for steps in (1, 2):
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


@pytest.fixture(scope="module")
def undisturbed(forks, corpus, pipeline_folder, tmp_path_factory) -> tuple[Path, int]:
    """The folder of a run, and its steps."""
    folder, steps = tmp_path_factory.mktemp("undisturbed"), 20
    words = small_run(corpus, pipeline_folder, folder, "run_id=one", steps=steps)
    assert forks.run(words, folder / "log")[0] == [0]
    return folder, steps


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 4096, 400_000])
def test_a_disk_that_fills_up_ends_a_run_in_one_line_and_it_goes_on_when_there_is_space(
    forks, corpus, pipeline_folder, undisturbed, small_disk, tmp_path, left
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
    folder, steps = undisturbed
    both = min(steps, reached + 4)  # steps that both have made: on a slow disk this run is the longer one
    assert visits(small_disk, both) == visits(folder, both)


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
    whole = train(pipeline_folder, corpus, tmp_path / "whole", 5, 2, 2, callbacks=[record])
    with pytest.raises(RuntimeError, match="broken off"):
        train(pipeline_folder, corpus, tmp_path / "cut", 5, 2, 2, callbacks=[Break(6)])  # one of two
    assert list(checkpoints_in(tmp_path / "cut" / "checkpoints")) == [3]
    last = str(tmp_path / "cut" / "checkpoints" / "last.ckpt")
    for accumulate, batch_size in ((2, 2), (4, 1), (1, 4)):
        seen = Record()
        folder = tmp_path / f"rest{accumulate}"
        rest = train(pipeline_folder, corpus, folder, 5, accumulate, batch_size, callbacks=[seen], ckpt_path=last)
        assert [i for batch in seen.keys for i in batch] == [i for batch in record.keys[6:] for i in batch]
        assert rest.global_step == 5 and rest.accumulation.samples_seen == whole.accumulation.samples_seen
        torch.testing.assert_close(weights(rest), weights(whole), atol=1e-5, rtol=0)


class BreakAtStart(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("no server there")


def test_what_breaks_off_before_a_run_goes_on_says_so_and_leaves_its_checkpoint(pipeline_folder, corpus, tmp_path):
    train(pipeline_folder, corpus, tmp_path, 2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    looks = [BreakAtStart(), MemorizationCurves(2, 0.7)]
    with pytest.raises(RuntimeError, match="no server there"):
        train(pipeline_folder, corpus, tmp_path, 4, callbacks=looks, ckpt_path=str(last))
    assert last.read_bytes() == before


def test_a_checkpoint_behind_which_nothing_is_left_is_refused(capsys, pipeline_folder, corpus, tmp_path):
    words = small_run(corpus, pipeline_folder, tmp_path, "callbacks.curves=null", steps=2)
    main([*words, "run_id=one"])
    last = tmp_path / "faults" / "one" / "checkpoints" / "last.ckpt"
    said = fails(capsys, *words, "run_id=two", f"ckpt_path={last}")
    assert "step-00000002.ckpt is of step 2, and trainer.max_steps=2 counts from the first" in said
    assert "say trainer.max_steps=4 for so many more" in said and not (tmp_path / "faults" / "two").exists()
    main([*words, "run_id=two", f"ckpt_path={last}", "trainer.max_steps=3"])
    assert "a run of its own from" in (tmp_path / "faults" / "two" / "run.log").read_text()
    (tmp_path / "faults" / "one" / "run.json").unlink()  # it was cut off before its end
    allowed = ("resume=auto", "resume.allow=[trainer.max_steps]", "run_id=one", "trainer.max_steps=1")
    shutil.rmtree(tmp_path / "faults" / "two")
    assert "nothing left to train" in fails(capsys, *words, *allowed)


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
