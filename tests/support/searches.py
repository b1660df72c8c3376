"""Searches whose trials are a program that takes no time, in this process or in one of their own."""

import os
import sys
import time
from pathlib import Path

from memtrain.cli.sweep import stopped_by_signals
from memtrain.sweep.plan import Plan
from memtrain.sweep.space import Parameter
from memtrain.sweep.study import Search
from memtrain.training.exit_codes import EXIT_CODES
from tests.support.forks import Forks

# A training program that takes no time: the copy rate falls with the threshold, the loss rises. It keeps its step,
# as a checkpoint, goes on from there with resume=, and writes down every step that it makes.
QUICK = """
import pathlib, signal, sys, time
said = dict(part.split("=", 1) for part in sys.argv[1:])
folder = pathlib.Path(said["runs_dir"].strip("'")) / said["name"].strip("'") / said["run_id"]
(folder / "config.yaml").touch()
checkpoint, metrics = folder / "checkpoint", folder / "metrics.csv"
begun = 0
if "resume" in said:
    assert pathlib.Path(said["resume"].strip("'")) == folder
    if checkpoint.exists() and checkpoint.read_text() == "damaged":
        print("error: it is damaged")
        sys.exit(2)
    begun = int(checkpoint.read_text()) if checkpoint.exists() else 0
def told(number, frame):
    with open(folder / "signals", "a") as file:
        file.write(f"{number} ")
    time.sleep(float(said.get("stubborn", 0)))
    sys.exit(143)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, told)
x = float(said["x"])
worse = 1 if said.get("bad") else 0
rows = metrics.read_text().splitlines()[1 : begun + 1] if begun else []
for step in range(begun + 1, int(said.get("steps", 3)) + 1):
    rows.append(f"{step},{1 - x + worse},{x + worse}")
    metrics.write_text("\\n".join(["step,copy_rate/canary,heldout_loss", *rows, ""]))
    checkpoint.write_text(str(step))
    with open(folder / "steps", "a") as file:
        file.write(str(step))
    time.sleep(100 if "hang" in said and "resume" not in said else float(said.get("pause", 0)))
sys.exit(int(said.get("code", 0)))
"""


def search(tmp_path, *overrides: str, prune=None, space=None, seed=0, storage=None, patience=None) -> Search:
    tmp_path.mkdir(exist_ok=True)
    if not (tmp_path / "quick.py").exists():
        (tmp_path / "quick.py").write_text(QUICK)
    space = space or [Parameter("x", "x", low=0.0, high=1.0)]
    plan = Plan("s", tmp_path / "runs", list(overrides), space, "copy_rate/canary", "heldout_loss", 2, seed, 0.02)
    return Search(plan, storage, [sys.executable, str(tmp_path / "quick.py")], prune, patience)


def states(one: Search) -> list[str]:
    return [trial.state.name for trial in one.study.get_trials()]


def cut_off(tmp_path) -> Path:
    """A sweep that is gone, with its trial, when that has made its first step. The trial's folder."""
    one = search(tmp_path)
    one.command.append("hang=1")
    process = one._start(dict(os.environ)).process
    made = process.folder / "steps"
    while not made.exists() or made.read_text() != "1":
        time.sleep(0.02)
    process.wait()
    return process.folder


def sweep(folder: str, *overrides: str) -> None:
    """As `memtrain sweep` does it, with the trainer above; for a process of its own."""
    one = search(Path(folder), *overrides)
    with stopped_by_signals(one, EXIT_CODES) as received:
        one.run(2, workers=1)
    sys.exit(EXIT_CODES[received[0]] if received else 0)


def swept(forks: Forks, folder: Path, *overrides: str) -> tuple[int, Path]:
    """The process of a sweep whose first trial has made its first step, and that trial's folder."""
    [process] = forks.start([str(folder), *overrides], folder / "log", function=sweep)
    run = folder / "runs" / "s" / "trial_000"
    forks.wait_until((run / "steps").exists)
    return process, run


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
