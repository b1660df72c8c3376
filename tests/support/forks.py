"""Runs the program, or a function, in processes of their own, without paying for the imports each time: a fork each,
of a fork of this process that does nothing else (tests/support/fork_server.py).
"""

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.fork_server import Request, live

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 1200.0  # s, for whatever a test waits for: nothing may depend on how fast a machine is
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Forks:
    """`with Forks() as forks: forks.start([...], log); forks.wait()`. One job at a time, of one or several ranks.

    To be made before anything has been computed, for children have of this process what it was then.

    `forks.python` is a program that does what `python` does; modules that import much run in a fork, too.
    """

    def __init__(self):
        self.going: list[tuple[int, socket.socket]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="memtrain-forks-"))
        self.address = str(self.folder / "socket")
        self.python = self.folder / "python"
        client = ROOT / "tests" / "support" / "fork_client.py"
        self.python.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -IS "{client}" "{self.address}" "{self.python}" "$@"\n'
        )
        self.python.chmod(0o755)
        end, self.lifeline = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.address)
            listener.listen(64)
            self.server = os.fork()
            if self.server == 0:
                os.close(self.lifeline)
                live(listener, end)
        os.close(end)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_) -> None:
        self._forget()
        os.close(self.lifeline)
        os.waitpid(self.server, 0)
        shutil.rmtree(self.folder)

    def start(
        self,
        argv: list,
        log: Path,
        ranks: int = 1,
        file_size: int = 0,
        function: Callable | None = None,
        **environment: str,
    ) -> list[int]:
        """Process ids, by rank. What rank 0 says is appended to `log`.0.

        Args:
            argv: of `memtrain`, or the arguments of `function`, which json can write.
            file_size: no file may be larger, bytes; 0: any may.
            function: a function of a module that can be imported.
        """
        self._forget()
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(ranks):
            of_torchrun = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
                "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forks", "MEMTRAIN_RUN_ID": f"run-{port}",
            }  # fmt: skip
            request = Request(
                module=None if function else "memtrain.cli.main",
                function=f"{function.__module__}.{function.__qualname__}" if function else None,
                arguments=argv,
                environment=os.environ | ONE_THREAD | (of_torchrun if ranks > 1 else {}) | environment,
                folder=os.getcwd(),
                executable=sys.executable,
                file_size=file_size,
                files=[0, 1, 2],
            )
            self.going.append(self._ask(request, Path(f"{log}.{rank}")))
        return [process for process, _ in self.going]

    def _ask(self, request: Request, log: Path) -> tuple[int, socket.socket]:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(PATIENCE)
        connection.connect(self.address)
        with open(os.devnull) as nothing, log.open("ab") as out:
            files = [nothing.fileno(), out.fileno(), out.fileno()]
            socket.send_fds(connection, [json.dumps(request).encode()], files)
        return int(connection.recv(64)), connection

    def _forget(self) -> None:
        """What a test that failed has left going on ends here, stopped processes too."""
        for _, connection in self.going:
            connection.close()
        self.going = []

    def wait(self) -> list[int]:
        """Exit codes, by rank; minus its number where a signal ended one."""
        codes = [int(connection.recv(64)) for _, connection in self.going]
        self._forget()
        return codes

    def run(self, argv: list[str], log: Path, **options) -> tuple[list[int], str]:
        """Exit codes, and what rank 0 said since the beginning of the log."""
        self.start(argv, log, **options)
        return self.wait(), self.said()

    def call(self, function: Callable, *arguments, log: Path, ranks: int = 1, **environment: str) -> None:
        """Calls a function in a child, or in one for each rank, and waits. Raises AssertionError where one fails."""
        arguments = [str(each) if isinstance(each, Path) else each for each in arguments]
        self.start(arguments, log, ranks, function=function, **environment)
        codes = self.wait()
        assert not any(codes), (codes, *map(self.said, range(ranks)))

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Raises AssertionError with what rank 0 said where a rank ends before it comes true."""
        wait_until(lambda: condition() or any(ended(process) for process, _ in self.going))
        assert condition(), self.said()

    def said(self, rank: int = 0) -> str:
        path = Path(f"{self.log}.{rank}")
        return path.read_text() if path.exists() else ""


def ended(process: int) -> bool:
    """Whether it has, waited for or not yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], object]) -> None:
    """Raises AssertionError where it does not come true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
