"""A run on two ranks that is killed again and again ends where the undisturbed run ends."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from memtrain.data.ledger import read_ledger
from memtrain.training.resume import RunState
from tests.support.forks import ended, wait_until
from tests.support.program import small_run

KILLS = int(os.environ.get("MEMTRAIN_SOAK_KILLS", "1"))
STEPS = 8 * KILLS


def end_as_torchrun_does(processes: list[int]) -> None:
    """Where one rank ends, the others are told, and killed if they stay."""
    wait_until(lambda: any(map(ended, processes)))
    end = time.monotonic() + 10.0
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if not ended(process):
                os.kill(process, number)
        wait_until(lambda: all(map(ended, processes)) or time.monotonic() > end)


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def rows(run: Path) -> list[dict]:
    found = read_ledger(run).to_table().to_pylist()
    return sorted(found, key=lambda row: (row["step"], row["key"], row["timestep"], row["loss"]))


def different(a, b, where: str) -> list[str]:
    """Where two checkpoints are not the same, bit for bit; NaN is a score that there is not yet."""
    if isinstance(a, torch.Tensor):
        same = a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        return [] if same else [where]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return [found for key in a for found in different(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple):
        assert len(a) == len(b), where
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in different(x, y, f"{where}[{i}]")]
    return [] if a == b else [where]


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_weights_and_ledger(forks, pipeline_folder, corpus, tmp_path):
    """SIGKILL and SIGTERM, to one rank or both, while it starts, trains or writes. MEMTRAIN_SOAK_KILLS=30 for more."""
    generator = random.Random(KILLS)
    more = ("exclusion=z_scores", "exclusion.warmup=2", "score.every_visits=2", "callbacks.checkpoint.every=2")
    argv = small_run(corpus, pipeline_folder, tmp_path, *more, "data.batch_size=2", steps=STEPS)
    codes, said = forks.run([*argv, "name=whole", "run_id=one"], tmp_path / "whole.log", ranks=2)
    assert codes == [0, 0], said
    argv += ["name=killed", "run_id=one", "resume=auto"]
    run, ways = tmp_path / "killed" / "one", []
    for kill in range(KILLS):
        processes = forks.start(argv, tmp_path / "killed.log", ranks=2)
        there = set(run.glob("checkpoints/step-*"))
        fresh, pause = (kill + 1) % 3, generator.uniform(0, 0.3)  # new checkpoints before it; 0: it still starts
        number = (signal.SIGKILL, signal.SIGTERM)[kill % 2]
        whom = generator.choice([processes, processes[:1], processes[1:]])
        seen = set(there)

        def made(seen=seen, there=there, fresh=fresh) -> bool:
            seen |= set(run.glob("checkpoints/step-*"))
            return len(seen) - len(there) >= fresh

        wait_until(lambda made=made, going=processes: made() or any(map(ended, going)))
        time.sleep(pause)
        if any(map(ended, processes)):  # it was at its end before
            assert forks.wait() == [0, 0] and kill, forks.said()
            break
        for process in whom:
            os.kill(process, number)
        end_as_torchrun_does(processes)
        ways.append((number.name, len(whom), forks.wait()))
    codes, said = forks.run(argv, tmp_path / "killed.log", ranks=2)
    assert codes == [0, 0], said
    whole = tmp_path / "whole" / "one"
    print(ways)
    assert RunState.read(run).finished_at == STEPS
    first, second = last(whole), last(run)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "memtrain", "DataModule", "global_step"):
        assert not different(first[part], second[part], part)
    assert rows(run) == rows(whole)
