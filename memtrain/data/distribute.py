"""Who does the tasks of a command that goes over shards or prompts: processes of this machine, or those of a cluster.

A task is done as a whole, by one worker, and what it gives comes back to the one process that started them all: only
that one writes what is common to the tasks, so that nothing is there twice. A task whose worker dies is given to
another one; after `TRIES` it is named and left, and the others go on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import re
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from memtrain.data.crews import (
    PASSING,
    TRIES,
    Answer,
    Crew,
    Done,
    Gone,
    Raised,
    Ready,
    answer_to,
    in_words,
    portable,
    prepared,
    raise_what_stays,
    shared,
)

__all__ = ["TRIES", "Distributor", "Done", "Local", "Part", "in_order"]

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_STOPPED_SOFTLY = 5.0  # s that a worker has to end by itself


@dataclass(frozen=True)
class Part:
    """The `number`-th of `count` equal parts of a command's tasks, each of which somebody does: `part=3/64`."""

    number: int = 1
    count: int = 1

    @staticmethod
    def parse(text: str) -> Part:
        """Raises ValueError where it is not N/M with N from 1 to M."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"part={text} is not one of 1/M to M/M; say part=3/64 for the third of 64")
        return Part(int(found[1]), int(found[2]))

    def of(self, total: int) -> range:
        """The places of this part's tasks among all: every `count`-th, so that parts are alike. Together all."""
        return range(self.number - 1, total, self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


class Distributor(ABC):
    """Workers that share tasks. `run` may be called any number of times."""

    @abstractmethod
    def run(
        self,
        function: Callable[..., R],
        tasks: Iterable[T],
        prepare: Callable[[], Any] | None = None,
        name: Callable[[T], str] = str,
    ) -> Iterator[Done[R]]:
        """`function(task)` of each task, by any worker; what is done comes as it is done, in no order.

        Args:
            function: of a module, as all that goes to and fro is pickled. Done again where its worker has died, so
                that it must not matter that it was begun before: what it writes is written aside and renamed.
            tasks: taken as workers become free, so that they may be made one by one.
            prepare: what each worker calls once, before its first task: then it is `function(prepare(), task)`. Such
                a worker has a GPU of its own where there are any.
            name: what a task is called where its worker dies.

        Raises:
            Exception: what a task raised, where it is of a kind that trying again cannot mend, and whatever
                `prepare` raised. OSError and MemoryError are tried again, but for a full disk.
        """


def in_order(done: Iterable[Done[R]], name: Callable[[int], str]) -> Iterator[R]:
    """What tasks gave, in their order, each as soon as it and all before it are done; later ones wait in memory.

    Args:
        name: what the task of this place is called.

    Raises:
        OSError: a task was left.
    """
    waiting: dict[int, R] = {}
    place = 0
    for one in done:
        if one.failure is not None:
            raise OSError(f"{name(one.index)} could not be done: {one.failure}; the same command tries it again")
        waiting[one.index] = one.result  # type: ignore[assignment]  # it may be None, where that is what R is
        while place in waiting:
            yield waiting.pop(place)
            place += 1


@dataclass
class Local(Distributor):
    """Processes of this machine; with one worker all is done in this process."""

    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be >= 1, got {self.workers}")

    def run(
        self,
        function: Callable[..., R],
        tasks: Iterable[T],
        prepare: Callable[[], Any] | None = None,
        name: Callable[[T], str] = str,
    ) -> Iterator[Done[R]]:
        if self.workers == 1:
            return _in_this_process(function, tasks, prepare, name)
        return shared(_Processes(self.workers, function, prepare), tasks, name)


def _in_this_process(
    function: Callable[..., R], tasks: Iterable[T], prepare: Callable[[], Any] | None, name: Callable[[T], str]
) -> Iterator[Done[R]]:
    work = None
    for index, task in enumerate(tasks):
        work = work or (function if prepare is None else partial(function, prepare()))
        for tried in range(1, TRIES + 1):
            try:
                done = Done(index, work(task))
            except PASSING as error:
                raise_what_stays(error)
                if tried < TRIES:
                    log.warning("%s: %s; it is tried again", name(task), in_words(error))
                    continue
                log.warning("%s is left after %d tries: %s", name(task), TRIES, in_words(error))
                done = Done(index, failure=in_words(error))
            yield done
            break


# ---- processes of this machine


@dataclass(eq=False)
class _Process:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    place: int  # of all workers' places, no other's that is alive


class _Processes(Crew):
    """A process a worker, each with a pipe of its own: so it is known which task one died of, and one whose starter
    has died finds its pipe closed."""

    def __init__(self, workers: int, function: Callable, prepare: Callable[[], Any] | None):
        self.workers, self.function, self.prepare = workers, function, prepare
        self.context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
        self.alive: list[_Process] = []

    def places(self) -> int:
        return self.workers

    def hire(self) -> _Process:
        ours, theirs = self.context.Pipe()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // self.workers)  # each: the processes fill the cores
        place = min(set(range(self.workers)) - {worker.place for worker in self.alive})
        process = self.context.Process(target=_serve, args=(theirs, place, threads, self.prepare is not None))
        process.start()
        theirs.close()
        worker = _Process(process, ours, place)
        self.alive.append(worker)
        self._send(worker, (self.function, self.prepare))
        return worker

    def give(self, worker: _Process, task: Any) -> None:
        self._send(worker, task)

    def _send(self, worker: _Process, what: Any) -> None:
        data = pickle.dumps(what)  # here: what cannot be pickled is an error, a pipe that is closed is not
        with suppress(OSError):  # it has died: that is heard next
            worker.connection.send_bytes(data)

    def listen(self, workers: list[_Process]) -> list[tuple[_Process, Answer]]:
        by_connection = {worker.connection: worker for worker in workers}
        return [(by_connection[ready], self._hear(by_connection[ready])) for ready in wait(list(by_connection))]  # type: ignore[index]

    def _hear(self, worker: _Process) -> Answer:
        try:
            return worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            worker.connection.close()
            self.alive.remove(worker)
            return Gone(_how(worker.process.exitcode or 0))

    def dismiss(self) -> None:
        for worker in self.alive:
            worker.connection.close()  # one without a task ends by this
        for worker in self.alive:
            worker.process.terminate()
        for worker in self.alive:
            worker.process.join(_STOPPED_SOFTLY)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.alive.clear()


def _how(code: int) -> str:
    """In words, how a process ended."""
    if code == -signal.SIGKILL:
        return "its worker was killed (SIGKILL; where memory runs out the system does that)"
    return f"its worker was ended by {signal.Signals(-code).name}" if code < 0 else f"its worker exited with {code}"


def _serve(connection: Connection, place: int, threads: int, has_gpu: bool) -> None:
    """A worker's life: what it does comes first, then tasks until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it, and closes the pipe
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported, with the function
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        said = connection.recv_bytes()
        if has_gpu:
            _take_a_gpu(place)
        try:
            work = prepared(*pickle.loads(said))
        except Exception as error:
            connection.send(Raised(portable(error)))
            return
        connection.send(Ready())
        while True:
            connection.send_bytes(answer_to(work, connection.recv_bytes()))


def _take_a_gpu(place: int) -> None:
    """Workers with a model take the machine's GPUs in turn, where there are any."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = range(torch.cuda.device_count()) if named is None else named.split(",")
    if there:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(there[place % len(there)])
