"""Files that are computed once and kept: whole under their name, checked when they are read, made by one process.

Any number of processes and ranks may start together on the same cache folder. What they find may be damaged, or come
from a stranger's server: nothing is allocated by what a header says.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.core.files import written_aside

# what numpy's reader raises, by what is wrong with a header
DAMAGED = (
    OSError, ValueError, TypeError, SyntaxError, tokenize.TokenError, OverflowError, MemoryError, RecursionError,
)  # fmt: skip

MANY = 1_000_000  # of what is kept of so many samples, the processes of a machine should have but one copy


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


def once(folder: Path, said: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays that one process makes, in files that all processes of a machine map, and so hold once.

    Args:
        said: names what they are made of; another text, other files.
        make: the arrays by their names, the same names each time.
    """
    stem = hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()[:32]

    def look() -> dict[str, np.ndarray] | None:
        try:
            names = json.loads((folder / f"{stem}.json").read_bytes())
            found = {str(name): read_array(folder / f"{stem}.{name}.npy") for name in names}
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        whole = {name: values for name, values in found.items() if values is not None}
        return whole if len(whole) == len(found) else None

    found = look()
    if found is None:
        with one_at_a_time(folder, [stem]):
            found = look()
            if found is None:
                made = make()
                for name, values in made.items():
                    write_array(folder / f"{stem}.{name}.npy", values)
                with written_aside(folder / f"{stem}.json", shared=True) as aside:  # last: it makes the rest valid
                    aside.write_text(json.dumps(list(made)), encoding="utf-8")
                found = look() or dict(made)
    return found


def once_of(folder: Path, make: Callable[[], Mapping[str, np.ndarray]], *inputs: np.ndarray) -> dict[str, np.ndarray]:
    """The same, of arrays that are all they are made of."""
    digest = hashlib.sha256()
    for values in inputs:
        digest.update(f"{values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return once(folder, digest.hexdigest(), make)


def rows_of(path: str | Path) -> int:
    """About how many rows a parquet or a file of lines has; 0 where it cannot be read."""
    file = Path(path).expanduser()
    with contextlib.suppress(OSError, pa.ArrowInvalid):
        return file.stat().st_size // 20 if file.suffix == ".txt" else pq.read_metadata(file).num_rows
    return 0


def file_state(path: str | Path) -> str:
    """Names a file in its present state. Raises OSError where there is none."""
    file = Path(path).expanduser().absolute()
    status = file.stat()
    return f"{file} {status.st_size} {status.st_mtime_ns}"


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
