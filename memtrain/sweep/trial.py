"""One trial: `memtrain train` as a process group of its own, and what its run's folder says so far."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from memtrain.report.curves import read_metrics
from memtrain.sweep import guard
from memtrain.sweep.pruning import Curve, Objectives

LOG = "trial.log"  # in the run's folder: what the trial printed
# What a scheduler or torchrun says of the sweep is not meant for its trials, which are programs of their own.
_NOT_INHERITED = ("SLURM_", "TORCHELASTIC_", "MEMTRAIN_RUN_ID")
_RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


class Process:
    """The processes of a trial that is going on in `folder`, started when this is made.

    Args:
        command: the program and its overrides.
        folder: of its run; made if it is not there.
        environment: all of its environment variables.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._began = time.time()
        with (folder / LOG).open("ab") as log:
            self._began_at = log.tell()  # behind what earlier starts of the run printed
            self._guard = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, log.name, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # an interrupt from the keyboard reaches the sweep alone
            )

    @property
    def exit_code(self) -> int | None:
        """The trial's exit code: None while it is going on, 128 + the signal's number where one ended it."""
        return self._guard.poll()

    @property
    def seconds(self) -> float:
        """Seconds since it was started."""
        return time.time() - self._began

    @property
    def silent_for(self) -> float:
        """Seconds since it last wrote something into its folder."""
        there = (self.folder / name for name in (LOG, "metrics.csv", "checkpoints", "ledger"))
        return time.time() - max(self._began, *(path.stat().st_mtime for path in there if path.exists()))

    def let_go(self) -> None:
        """Tell the whole group to end."""
        self._guard.stdin.close()

    def wait(self) -> None:
        """Wait until the whole group has ended, or its time to do so is up."""
        self._guard.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # not even SIGKILL ends what waits for a disk that is gone
            self._guard.wait(timeout=guard.GRACE + 10)

    def last_words(self) -> str:
        """The last line that it printed, its error if it ended with one."""
        printed = (self.folder / LOG).read_bytes()[self._began_at :].decode(errors="replace")
        said = [line.strip() for line in printed.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("error: ")]
        return (errors or said or ["it printed nothing"])[-1].removeprefix("error: ")


def read_curve(folder: Path, memorization: str, quality: str) -> Curve:
    """What a run measured at each step at which both columns of its `metrics.csv` have a value; {} if none yet."""
    path = folder / "metrics.csv"
    if not path.exists():
        return {}
    columns = read_metrics(path)
    first, second = (dict(zip(*columns.get(name, ([], [])), strict=True)) for name in (memorization, quality))
    return {step: Objectives(first[step], second[step]) for step in sorted(first.keys() & second.keys())}


def environment_of(slot: int, workers: int, cores: int, devices: Sequence[str]) -> dict[str, str]:
    """The environment of a trial that shares the machine with `workers` - 1 others.

    Args:
        slot: of the worker, from 0.
        cores: of the machine; each trial gets its share of threads, unless OMP_NUM_THREADS is set.
        devices: ids of the GPUs; each trial sees its share of them, or one that several use.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_INHERITED) and name not in _RANK_VARIABLES
    }
    kept.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    if devices:
        own = devices[slot::workers] or [devices[slot % len(devices)]]
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return kept


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices() -> list[str]:
    """Ids of the GPUs that this process sees."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and torch.cuda.is_available():
        return [name for name in named.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def spoken(seconds: float) -> str:
    """A duration as a person says it: 4 s, 4 min, 4.0 h."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
