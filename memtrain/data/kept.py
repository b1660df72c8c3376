"""Files that are computed once and kept: whole under their name, checked when they are read, made by one process.

Any number of processes and ranks may start together on the same cache folder. What they find may be damaged, or come
from a stranger's server: nothing is allocated by what a header says.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from memtrain.core.files import written_aside

# what numpy's reader raises, by what is wrong with a header
DAMAGED = (
    OSError, ValueError, TypeError, SyntaxError, tokenize.TokenError, OverflowError, MemoryError, RecursionError,
)  # fmt: skip


def write_array(path: str | Path, values: np.ndarray) -> None:
    """Save as .npy, written aside and renamed."""
    with written_aside(Path(path), shared=True) as aside, aside.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def read_array(path: str | Path) -> np.ndarray | None:
    """A .npy, mapped into memory; None where there is none, or none that is whole."""
    try:
        return np.lib.format.open_memmap(path, mode="r")  # refuses pickles, and what is longer than the file
    except DAMAGED:
        return None


@contextlib.contextmanager
def locked(path: Path, flags: int = 0) -> Iterator[None]:
    """Hold a lock file against all other threads and processes; one that dies lets go of it."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a worker forked meanwhile has it open


@contextlib.contextmanager
def one_at_a_time(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Have one process make these files of a folder; look again what is missing once it is your turn.

    Where the file system has no locks, all make them, each aside.
    """
    digest = hashlib.sha256("\n".join(sorted(names)).encode(errors="surrogateescape")).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(locked(folder / f".{digest}.lock"))
        yield


@contextlib.contextmanager
def alone(file: Path, remedy: str) -> Iterator[None]:
    """Be the only process that holds this lock file, as far as the file system has locks.

    Args:
        file: in a folder that is there.
        remedy: what to do where another process holds it.

    Raises:
        ValueError: another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(file, fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(f"another process is at work on {file.parent}; {remedy}") from None
        except OSError:
            pass  # no locks here
        yield
