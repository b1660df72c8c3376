"""`distributor=ray`: tasks shared by the workers of a Ray cluster, which may come, go and lose its head.

Ray ends a program whose cluster's head is gone. So a process of its own, the bridge, is the one that Ray knows; this
one only talks to it over a pipe, keeps what is done, and starts another bridge when the head is back.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from memtrain.data.crews import Answer, Crew, Gone, shared
from memtrain.data.distribute import Distributor, Done

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 600.0  # s that a cluster whose head is gone has to come back
_LOOKS = 5.0  # s between two looks at how large the cluster is
_CONNECTS = 5.0  # s for a connection to a head
_AGAIN = 2.0  # s between two tries to join it
_ANSWERS = 120.0  # s within which a cluster that is there lets one join, on busy machines, too
_STARTS = 600.0  # s within which one of our own has started
_GOODBYE = 20.0  # s that the bridge has to end by itself
OWN = "local"  # as Ray calls a cluster that lasts as long as who started it
_TOLD = ("MEMTRAIN_CACHE", "HF_HOME", "HF_HUB_OFFLINE")  # of the environment, to workers on other machines


@dataclass
class OnRay(Distributor):
    """Workers of a Ray cluster: one a core, or one a GPU where they prepare something and there are any.

    All paths must lead to the same files on each of its machines.

    Args:
        address: HOST:PORT of its head; `auto` is the one that runs here or that RAY_ADDRESS names, else one of this
            machine's own for as long as it takes.
        workers: at a time; None: as many as there is room for, also when machines join.
        patience: s that the head may be gone.
    """

    address: str = "auto"
    workers: int | None = None
    patience: float = PATIENCE

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be >= 1, got {self.workers}")

    def run(
        self,
        function: Callable[..., R],
        tasks: Iterable[T],
        prepare: Callable[[], Any] | None = None,
        name: Callable[[T], str] = str,
    ) -> Iterator[Done[R]]:
        return shared(_Bridged(self, function, prepare), tasks, name)


# ---- what the bridge is told, and says


@dataclass(frozen=True)
class _Start:
    worker: int


@dataclass(frozen=True)
class _Do:
    worker: int
    task: bytes


@dataclass(frozen=True)
class _Joined:
    """The bridge is part of the cluster, in which so many workers have room."""

    places: int


@dataclass(frozen=True)
class _Refused:
    """There is no such cluster, or it could not be joined."""

    why: str


class _Bridged(Crew):
    """Workers beyond a bridge. Those of one that has gone are `Gone`, through no fault of their tasks."""

    def __init__(self, ray: OnRay, function: Callable, prepare: Callable[[], Any] | None):
        self.ray, self.work = ray, pickle.dumps((function, prepare))
        self.address, self.has_prepared = ray.address, prepare is not None
        self.bridge: tuple[multiprocessing.process.BaseProcess, Connection] | None = None
        self.room = 0
        self.hired = 0

    def places(self) -> int:
        if self.bridge is None:
            self._join()
        return self.room if self.ray.workers is None else self.ray.workers

    def _join(self) -> None:
        """Start a bridge and wait until it is part of the cluster.

        Raises:
            ValueError: there is no such cluster.
            OSError: it was there, and has been gone for too long.
        """
        was_there, end = self.hired > 0, time.monotonic() + self.ray.patience
        if self.address == "auto":
            self.address = _running_here()
        while True:
            said = self._start()
            if isinstance(said, _Joined):
                self.room = said.places
                if self.room == 0:
                    log.warning("the Ray cluster at %s has no room for a worker yet; waiting", self.address)
                if was_there:
                    log.warning("the Ray cluster at %s is back; going on", self.address)
                return
            why = said.why if isinstance(said, _Refused) else "it does not answer"
            if not was_there:
                raise ValueError(f"ray.address={self.ray.address} cannot be joined: {why}")
            if time.monotonic() > end:
                raise OSError(
                    f"the Ray cluster at {self.address} has been gone for {self.ray.patience:g} s; what was done is "
                    "kept, and the same command goes on with it"
                )
            time.sleep(_AGAIN)

    def _start(self) -> _Joined | _Refused | None:
        if not _listens(self.address):  # Ray would try for minutes
            return _Refused("nobody listens there")
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        told = {name: os.environ[name] for name in _TOLD if name in os.environ}
        shipped = self.work, os.getcwd(), list(sys.path), told
        process = context.Process(target=_be_a_bridge, args=(theirs, self.address, self.has_prepared, shipped))
        process.start()
        theirs.close()
        self.bridge = process, ours
        try:
            said = ours.recv() if ours.poll(_STARTS if self.address == OWN else _ANSWERS) else None
        except (EOFError, OSError):
            said = None
        if not isinstance(said, _Joined):
            process.kill()  # Ray goes on trying, whatever is asked of it
            self._end_bridge()
        return said

    def hire(self) -> int:
        self.hired += 1
        self._tell(_Start(self.hired))
        return self.hired

    def give(self, worker: int, task: Any) -> None:
        self._tell(_Do(worker, pickle.dumps(task)))

    def _tell(self, what: _Start | _Do) -> None:
        if self.bridge is not None:
            with suppress(OSError):  # it has gone: that is heard next
                self.bridge[1].send(what)

    def listen(self, workers: list[int]) -> list[tuple[int, Answer]]:
        if self.bridge is None:
            return [(worker, self._lost()) for worker in workers]
        try:
            said = self.bridge[1].recv()
        except (EOFError, OSError):
            self._end_bridge()
            log.warning("the head of the Ray cluster at %s is gone; waiting for it to come back", self.address)
            return [(worker, self._lost()) for worker in workers]
        if isinstance(said, _Joined):
            self.room = said.places
            return []
        worker, answer = said
        return [(worker, pickle.loads(answer) if isinstance(answer, bytes) else answer)]

    def _lost(self) -> Gone:
        return Gone(f"the Ray cluster at {self.address} is gone", is_blameless=True)

    def dismiss(self) -> None:
        self._end_bridge()

    def _end_bridge(self) -> None:
        """Close the pipe, by which a bridge takes leave of the cluster."""
        if self.bridge is None:
            return
        process, connection = self.bridge
        self.bridge = None
        connection.close()
        process.join(_GOODBYE)
        if process.is_alive():
            process.kill()
            process.join()


def _running_here() -> str:
    """The cluster that RAY_ADDRESS names or that was started here last, if it still runs; else one of our own."""
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # `ray start` writes it
    with suppress(OSError):
        address = os.environ.get("RAY_ADDRESS") or noted.read_text().strip()
        if address not in ("", "auto") and _listens(address):
            return address
    log.info("no Ray cluster runs here; this command starts one of its own")
    return OWN


def _listens(address: str) -> bool:
    """Whether somebody does at HOST:PORT; true of what is no such address."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return True
    with suppress(OSError):
        socket.create_connection((host, int(port)), _CONNECTS).close()
        return True
    return False


# ---- the bridge, a process of its own


# the function and what prepares it, pickled; the command's folder, its sys.path, and what it tells of its environment
Shipped = tuple[bytes, str, list[str], dict[str, str]]


def _be_a_bridge(connection: Connection, address: str, has_prepared: bool, shipped: Shipped) -> None:
    """Join the cluster, start workers and give them tasks as the pipe says; leave when it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started this, and closes the pipe
    with open(os.devnull, "wb") as nothing:  # what Ray has to say of a dead worker is a paragraph; we have a line
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own advice, or it says so each time
    import ray

    sending = threading.Lock()

    def say(what: Any) -> None:
        with sending, suppress(OSError):  # nobody listens any more
            connection.send(what)

    def places() -> int:
        there = ray.cluster_resources()
        return int(there.get("GPU", 0) if has_prepared and there.get("GPU") else there.get("CPU", 0))

    try:
        own = {"include_dashboard": False} if address == OWN else {}
        ray.init(address=address, configure_logging=False, log_to_driver=False, namespace="memtrain", **own)
        joined = _Joined(places())
        on_gpu = has_prepared and bool(ray.cluster_resources().get("GPU"))
    except Exception as error:
        say(_Refused(" ".join(str(error).split())[:300]))
        return
    say(joined)

    def look_again() -> None:
        seen = joined.places
        while True:
            time.sleep(_LOOKS)
            with suppress(Exception):  # it is about to leave, or the head is away
                if (now := places()) != seen:
                    say(_Joined(now))
                    seen = now

    threading.Thread(target=look_again, daemon=True).start()
    once = ray.put(shipped)  # for all workers
    actors: dict[int, Any] = {}
    kind = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0, max_restarts=0, max_task_retries=0)(_worker_class())

    def answer(worker: int, future: Any) -> None:
        try:
            said = future.result()
        except Exception as error:
            actors.pop(worker, None)
            said = Gone(_why(error))
        say((worker, said))

    try:
        while True:
            told = connection.recv()
            if isinstance(told, _Start):
                actors[told.worker] = kind.remote()
                reference = actors[told.worker].prepare.remote(once)
            elif told.worker in actors:
                reference = actors[told.worker].do.remote(told.task)
            else:  # it has died meanwhile
                say((told.worker, Gone("its worker had died", is_blameless=True)))
                continue
            reference.future().add_done_callback(lambda future, worker=told.worker: answer(worker, future))
    except (EOFError, OSError):
        for actor in list(actors.values()):
            ray.kill(actor)
        ray.shutdown()


def _why(error: Exception) -> str:
    """Why a worker is gone. What Ray says is several lines, and names many causes where it knows none."""
    said = " ".join(str(error).split())
    if "low on memory" in said:
        return "its worker was killed, as its machine was short of memory"
    if "node has died" in said or "node died" in said:
        return "the machine of its worker is gone"
    if "creation task" in said or "Error" in said:
        return f"its worker died ({said[-200:]})"
    return "its worker died (killed, or for want of memory)"


def _worker_class() -> type:
    """The class of a worker; made here, so that Ray ships it whole and it can look for memtrain by itself."""

    class MemtrainWorker:
        def prepare(self, shipped: tuple[bytes, str, list[str], dict[str, str]]) -> bytes:
            import os
            import sys

            work, folder, path, environment = shipped
            sys.path += [entry for entry in path if entry not in sys.path]
            for name, value in environment.items():
                os.environ.setdefault(name, value)
            from memtrain.data.crews import start_work

            self.work, answer = start_work(work, folder)
            return answer

        def do(self, task: bytes) -> bytes:
            from memtrain.data.crews import answer_to

            return answer_to(self.work, task)

    return MemtrainWorker
