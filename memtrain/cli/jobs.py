"""Jobs of `-m`: each a run of its own, in this process or, with another of Hydra's launchers, in others."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from omegaconf import DictConfig

from memtrain.cli.launcher import new_run_id
from memtrain.cli.terminal import quiet
from memtrain.training.exit_codes import AGAIN, EXIT_CODES

log = logging.getLogger(__name__)

_EXTRAS = {"joblib": "joblib", "slurm": "submitit", "submitit_slurm": "submitit", "submitit_local": "submitit"}
# of joblib and of submitit, which need not be installed
_GONE = ("TerminatedWorkerError", "UncompletedJobError", "FailedJobError")
_stopped_with: int | None = None  # joblib gives a process one job after the other; when one was stopped, all are


class Stopped(Exception):
    """A signal has ended a job in another process. Hydra brings exceptions from there, but no exits.

    Args:
        code: what the job would have exited with.
    """

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def is_job() -> bool:
    """One of several that `-m` starts."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def job_run_id() -> str:
    """The run's id; jobs of -m add their number to the one that they have in common."""
    from hydra.core.hydra_config import HydraConfig

    return f"{new_run_id()}-{HydraConfig.get().job.num}" if is_job() else new_run_id()


def check(overrides: Sequence[str]) -> None:
    """Raises ValueError where the launcher cannot work here, or all jobs would write into one run's folder."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in ("run_id", "run_dir") and not re.search(r",|\$\{", value):
            raise ValueError(
                f"{override} is for one run, and -m starts several; they get a number each: MEMTRAIN_RUN_ID=mine "
                "makes the runs mine-0, mine-1 and so on"
            )
        if key == "hydra/launcher" and value in _EXTRAS:
            if not _is_installed(f"hydra_plugins.hydra_{_EXTRAS[value]}_launcher"):
                raise ValueError(f"{override} needs an extra: pip install '.[{_EXTRAS[value]}]'")
            if "slurm" in value and shutil.which("srun") is None:
                raise ValueError(f"{override}: there is no srun here; say it where sbatch works, or use joblib")


def _is_installed(module: str) -> bool:
    with suppress(ModuleNotFoundError):  # of the package it lies in
        return importlib.util.find_spec(module) is not None
    return False


def run(task: Callable[[DictConfig], Any], cfg: DictConfig, started_in: int) -> Any:
    """One job. `started_in`: the process in which `-m` was said.

    Raises:
        Stopped: a signal has ended it, in another process.
    """
    global _stopped_with
    if os.getpid() == started_in:  # one after the other: a signal ends all
        with _apart():
            return task(cfg)
    if _stopped_with is not None:
        raise Stopped(_stopped_with)
    _check_tasks()
    _take_a_gpu()
    try:
        with _apart():
            return task(cfg)
    except SystemExit as stop:
        if "SUBMITIT_EXECUTOR" in os.environ:
            _put_back(stop)
            raise
        _stopped_with = stop.code
        raise Stopped(stop.code) from None


def _check_tasks() -> None:
    tasks = int(os.environ.get("SUBMITIT_LOCAL_NTASKS", 1))
    if tasks > 1:
        raise ValueError(
            f"hydra.launcher.tasks_per_node={tasks}: submitit_local does not join tasks to ranks of one run; say 1, "
            "or use launch/local.sh"
        )


def _take_a_gpu() -> None:
    """joblib's processes all see all GPUs, and each would train on the first: they take one each, in turn."""
    number = re.fullmatch(r"LokyProcess-(\d+)", multiprocessing.current_process().name)
    if number is None:
        return
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = range(torch.cuda.device_count()) if named is None else named.split(",")
    if there:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(there[(int(number[1]) - 1) % len(there)])


def _put_back(stop: SystemExit) -> None:
    """Where a job asks to be started again: submitit's own handler, for which ours stood in, puts it into the queue."""
    if stop.code == AGAIN:
        signal.raise_signal(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])


@contextmanager
def _apart() -> Iterator[None]:
    """Jobs, in one process or each in its own, log to their own run alone."""
    quiet()
    logger = logging.getLogger("memtrain")
    before = list(logger.handlers)
    try:
        yield
    finally:
        for handler in [handler for handler in logger.handlers if handler not in before]:
            logger.removeHandler(handler)
            handler.close()
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish()


@contextmanager
def stopped_together() -> Iterator[None]:
    """A signal to the process in which `-m` was said is for all jobs: each ends with a checkpoint. A second ends it."""
    told: list[int] = []

    def tell(number: int, frame: FrameType | None) -> None:
        others = multiprocessing.active_children()
        if told or not others:
            sys.exit(EXIT_CODES[number])
        told.append(number)
        for process in others:
            os.kill(process.pid, number)

    before = {number: signal.signal(number, tell) for number in EXIT_CODES}
    try:
        yield
    except (Exception, SystemExit) as error:
        code = EXIT_CODES[told[0]] if told else getattr(error, "code", None)
        if code in EXIT_CODES.values():
            log.warning(
                "the same command with MEMTRAIN_RUN_ID=%s goes on with these runs", os.environ["MEMTRAIN_RUN_ID"]
            )
            sys.exit(code)
        if type(error).__name__ in _GONE:
            said = " ".join(str(error).split("\n")[:2]).strip()
            raise ChildProcessError(f"a job has no result: {said}") from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
