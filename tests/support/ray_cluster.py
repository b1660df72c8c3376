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

from tests.support.forks import PATIENCE

SECONDS_WITHOUT_HEAD = "3"  # after which Ray ends whoever needs it; 60 unless said


class RayCluster:
    """`address` stays the same when the head is gone and comes back."""

    def __init__(self, folder: str, port: int):
        self.folder, self.address = folder, f"127.0.0.1:{port}"
        self.nodes: list[subprocess.Popen] = []

    def start_head(self) -> None:
        self._start("--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self.folder}")

    def join(self) -> None:
        self._start(f"--address={self.address}")

    def _start(self, *options: str) -> None:
        log = Path(self.folder, f"node-{len(self.nodes)}.log")
        log.parent.mkdir(exist_ok=True)
        words = ["start", *options, "--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=80000000",
                 "--include-dashboard=false", "--disable-usage-stats", "--block"]  # fmt: skip
        with log.open("wb") as file:
            self.nodes.append(
                subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", *words], stdout=file, stderr=file)
            )
        end = time.monotonic() + PATIENCE
        while b"--block" not in log.read_bytes():  # said when all of the node's processes are there
            assert self.nodes[-1].poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)

    def kill_head(self) -> None:
        """As where its machine loses power: no process of it says goodbye."""
        head = self.nodes.pop(0)
        _kill(head)

    def shut_down(self) -> None:
        for node in self.nodes:
            _kill(node)


def _kill(node: subprocess.Popen) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
    node.wait()


@contextlib.contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """Two nodes of a core each, with a token of their own, as whoever finds the port could run programs."""
    said = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": SECONDS_WITHOUT_HEAD, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = RayCluster(tempfile.mkdtemp(prefix="ray-"), port)  # short: sockets lie in it
    try:
        cluster.start_head()
        cluster.join()
        yield cluster
    finally:
        cluster.shut_down()
        shutil.rmtree(cluster.folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
