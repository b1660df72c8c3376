"""Tasks among workers that may die: who has which, who takes over, what is left; and what a worker says of a task.

`memtrain.data.distribute` says what this is for.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

TRIES = 3  # of a task whose worker dies, or that fails in a way that another time may not
FULL = (errno.ENOSPC, errno.EDQUOT)
PASSING = (OSError, MemoryError)  # another worker, or another minute, may have better luck


@dataclass(frozen=True)
class Done(Generic[R]):
    """One task is over: `result` is what it gave, or `failure` says why it was left; `index` is its place."""

    index: int
    result: R | None = None
    failure: str | None = None


def raise_what_stays(error: Exception) -> None:
    """Raises an error again that another try would meet, too."""
    if not isinstance(error, PASSING) or (isinstance(error, OSError) and error.errno in FULL):
        raise error


def in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory ({said})" if said else "out of memory"
    return said or type(error).__name__


# ---- tasks among workers that may die


@dataclass(frozen=True)
class Ready:
    """A worker has prepared what it needs."""


Said = tuple[str, int, str]  # logger, level, message


@dataclass(frozen=True)
class Given:
    """A worker has done its task, and this is what it gave, and what it logged."""

    result: Any
    said: list[Said]


@dataclass(frozen=True)
class Raised:
    """A worker's task, or its preparation, raised this; the worker is alive."""

    error: Exception
    said: list[Said] = field(default_factory=list)


@dataclass(frozen=True)
class Gone:
    """A worker is dead; blameless where its task has no part in that, and may be tried as often as before."""

    why: str
    is_blameless: bool = False


Answer = Ready | Given | Raised | Gone


class Crew(ABC):
    """Workers of one run. A worker is whatever can be looked up; it says `Ready` once, then answers each task."""

    @abstractmethod
    def places(self) -> int:
        """How many workers there is room for, now."""

    @abstractmethod
    def hire(self) -> Any:
        """Start one more worker."""

    @abstractmethod
    def give(self, worker: Any, task: Any) -> None:
        """Hand a task to a worker that has nothing to do."""

    @abstractmethod
    def listen(self, workers: list[Any]) -> list[tuple[Any, Answer]]:
        """Wait until some of these, which prepare or have a task, say something. May return none after a while."""

    @abstractmethod
    def dismiss(self) -> None:
        """End all workers."""


@dataclass
class _Try(Generic[T]):
    index: int
    task: T
    deaths: int = 0


@dataclass
class _Staff:
    """Who does what: of all workers, those that prepare, those without a task, and the others' tasks."""

    starting: set[Any] = field(default_factory=set)
    idle: list[Any] = field(default_factory=list)
    busy: dict[Any, _Try] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.starting) + len(self.idle) + len(self.busy)


def shared(crew: Crew, tasks: Iterable[T], name: Callable[[T], str]) -> Iterator[Done[Any]]:
    """The tasks, done by a crew; see `Distributor.run`."""
    source, queue, staff = enumerate(tasks), deque[_Try[T]](), _Staff()
    died_preparing = 0  # in a row
    try:
        while True:
            places = max(1, crew.places())
            while len(queue) < places and (found := next(source, None)) is not None:
                queue.append(_Try(*found))
            while queue and staff.idle:
                worker, given = staff.idle.pop(), queue.popleft()
                crew.give(worker, given.task)
                staff.busy[worker] = given
            while len(staff) < places and len(staff.starting) < len(queue):
                staff.starting.add(crew.hire())
            if not queue and not staff.busy:
                return
            for worker, answer in crew.listen([*staff.starting, *staff.busy]):
                if worker in staff.starting:
                    staff.starting.remove(worker)
                    if isinstance(answer, Raised):
                        raise answer.error
                    if not isinstance(answer, Gone):
                        staff.idle.append(worker)
                        died_preparing = 0
                    elif not answer.is_blameless:
                        died_preparing += 1
                        if died_preparing == TRIES:
                            raise OSError(f"{TRIES} workers in a row died before their first task: {answer.why}")
                    continue
                given = staff.busy.pop(worker)
                if not isinstance(answer, Gone):
                    staff.idle.append(worker)
                for logger, level, message in answer.said if isinstance(answer, Given | Raised) else ():
                    logging.getLogger(logger).log(level, "%s", message)
                if isinstance(answer, Given):
                    yield Done(given.index, answer.result)
                    continue
                if isinstance(answer, Raised):
                    raise_what_stays(answer.error)
                    why = in_words(answer.error)
                else:
                    assert isinstance(answer, Gone)
                    if answer.is_blameless:
                        queue.appendleft(given)
                        continue
                    why = answer.why
                given.deaths += 1
                if given.deaths < TRIES:
                    log.warning("%s: %s; it is tried again", name(given.task), why)
                    queue.appendleft(given)
                else:
                    log.warning("%s is left after %d tries: %s", name(given.task), TRIES, why)
                    yield Done(given.index, failure=why)
    finally:
        crew.dismiss()


# ---- what a worker does, wherever it is


def prepared(function: Callable[..., R], prepare: Callable[[], Any] | None) -> Callable[[Any], R]:
    """What a worker does with a task."""
    return function if prepare is None else partial(function, prepare())


def start_work(work: bytes, folder: str) -> tuple[Callable | None, bytes]:
    """What a worker does with a task, and what it has to say about its preparation, pickled."""
    try:
        try:
            os.chdir(folder)  # paths may be relative
        except OSError as error:
            where = os.uname().nodename
            raise ValueError(f"there is no folder {folder} on {where}; each machine of the cluster needs it") from error
        return prepared(*pickle.loads(work)), pickle.dumps(Ready())
    except Exception as error:
        return None, pickle.dumps(Raised(portable(error)))


def answer_to(work: Callable[[Any], Any] | None, task: bytes) -> bytes:
    """What a worker says about a task, pickled as the task is; a result that cannot be is an error of the task."""
    assert work is not None, "a worker whose preparation failed is given nothing to do"
    with _heard() as said:
        try:
            return pickle.dumps(Given(work(pickle.loads(task)), said))
        except Exception as error:
            return pickle.dumps(Raised(portable(error), said))


@contextmanager
def _heard() -> Iterator[list[Said]]:
    """What memtrain logs meanwhile, for the one that has a terminal."""
    said: list[Said] = []
    handler, logger = logging.Handler(), logging.getLogger("memtrain")
    handler.emit = lambda record: said.append((record.name, record.levelno, record.getMessage()))  # type: ignore[method-assign]
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def portable(error: Exception) -> Exception:
    """The error as one that survives the way to another process, with its traceback."""
    wrapped = ExceptionWithTraceback(error, error.__traceback__)
    try:
        pickle.loads(pickle.dumps(wrapped))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return wrapped  # it is unpickled as the error itself
