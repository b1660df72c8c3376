"""Tasks for workers, some of which go wrong: each a word, as `kill`, and a folder in which it leaves a mark a try."""

import os
import resource
import signal
from pathlib import Path

Task = tuple[str, str]  # what becomes of it, and a path whose parent is the folder


def tries(path: str) -> int:
    return len(list(Path(path).parent.glob(f"{Path(path).name}.*")))


def do(task: Task) -> tuple[str, int]:
    """The task's name, and its worker's process id."""
    what, path = task
    before = tries(path)
    Path(f"{path}.{before}").touch()
    if what == "kill" or (what == "kill once" and before == 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail" or (what == "fail once" and before == 0):
        raise OSError(f"no luck with {Path(path).name}")
    if what == "starve":
        _hold_more_than_there_is()
    if what == "refuse":
        raise ValueError(f"{Path(path).name} makes no sense")
    if what == "fill":
        raise OSError(28, "No space left on device", path)
    return Path(path).name, os.getpid()


def _hold_more_than_there_is() -> None:
    """Raises MemoryError, as where the system gives this process no more."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, limits[1]))
    try:
        bytearray(1 << 41)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def prepare(folder: str = "") -> str:
    """What is done once a worker, leaving a mark."""
    Path(f"{folder}/prepared.{os.getpid()}").touch()
    return f"{os.getpid()}"


def do_prepared(made: str, task: Task) -> tuple[str, int]:
    assert made == f"{os.getpid()}"
    return do(task)
