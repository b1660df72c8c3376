"""A Ray cluster of this machine: `ray start` for a head, and again for another node, a core each.

Its processes end with the programs that started them; nothing of another cluster is touched.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

STARTS = 3  # of a node: Ray gives its agents 15 s to start, which a busy machine may not have


class RayCluster:
    """`address` stays the same when the head is gone and comes back."""

    def __init__(self, folder: str, port: int):
        self.folder, self.address = folder, f"127.0.0.1:{port}"
        self.nodes: list[subprocess.Popen] = []
        self.started: dict[int, set[psutil.Process]] = {}  # by each node

    def start_head(self) -> None:
        port = self.address.rpartition(":")[2]
        self._start("--head", f"--port={port}", f"--temp-dir={self.folder}", "--include-dashboard=false")

    def join(self) -> None:
        self._start(f"--address={self.address}")

    def _start(self, *options: str) -> None:
        log = Path(self.folder, "node.log")
        log.parent.mkdir(exist_ok=True)
        words = ["start", *options, "--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=80000000",
                 "--disable-usage-stats", "--block"]  # fmt: skip
        for _ in range(STARTS):
            before = self._processes()
            with log.open("wb") as file:
                node = subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", *words], stdout=file, stderr=file)
            while node.poll() is None and b"--block" not in log.read_bytes():  # said when all its processes are there
                time.sleep(0.05)
            self.nodes.append(node)
            self.started[node.pid] = self._processes() - before
            if node.poll() is None:
                return
            self._kill(self.nodes.pop())
        raise AssertionError(log.read_text())

    def kill(self) -> None:
        """As where power is lost: no process says goodbye. (Ray starts no head where a node of another one runs.)"""
        while self.nodes:
            self._kill(self.nodes.pop())

    def _kill(self, node: subprocess.Popen) -> None:
        """End a node's program and Ray's processes that it has started, which have gone from under it."""
        started = self.started.pop(node.pid)
        node.kill()
        node.wait()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def _processes(self) -> set[psutil.Process]:
        """Those of Ray that name the cluster's folder."""
        found = psutil.process_iter(["cmdline"])
        return {process for process in found if any(self.folder in word for word in process.info["cmdline"] or ())}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """Two nodes of a core each, with a token of their own, as whoever finds the port could run programs."""
    said = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "60", "RAY_agent_register_timeout_ms": "300000",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    cluster = RayCluster(tempfile.mkdtemp(prefix="ray-"), _free_port())  # short: sockets lie in it
    try:
        cluster.start_head()
        cluster.join()
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(cluster.folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
