"""Runs the program, or a function, in processes of their own, without paying for the imports each time: a fork each.

Each line of the server's input is a job; for each rank a child does it, in the environment that torchrun gives.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 1200.0  # s, for whatever a test waits for: nothing may depend on how fast a machine is

_SERVER = """
import atexit, importlib, json, os, resource, sys, traceback
sys.path.insert(0, {root!r})
cache = os.environ.get("MEMTRAIN_CACHE", "")
import tests.conftest
os.environ["MEMTRAIN_CACHE"] = cache
import hydra, pytorch_lightning, diffusers, wandb
import memtrain.callbacks.canaries, memtrain.callbacks.curves, memtrain.callbacks.ledger, memtrain.callbacks.logging
import memtrain.callbacks.summary, memtrain.callbacks.validation, memtrain.cli.main, memtrain.cli.train
import memtrain.models.stable_diffusion
import memtrain.training.checkpoint, memtrain.training.module, memtrain.training.signals
from lightning_utilities.core.rank_zero import rank_zero_only

def run(job, rank):
    os.setpgid(0, 0)
    out = os.open(job["log"] + f".{{rank}}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False, buffering=1)
    os.environ.update(job["environment"])
    if job["ranks"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", GROUP_WORLD_SIZE="1",
            WORLD_SIZE=str(job["ranks"]), LOCAL_WORLD_SIZE=str(job["ranks"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(job["port"]), TORCHELASTIC_RUN_ID="forks", MEMTRAIN_RUN_ID=job["run_id"])
    rank_zero_only.rank = rank
    if job["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"],) * 2)
    code = 0
    try:
        if job["function"]:
            module, _, name = job["function"].rpartition(".")
            getattr(importlib.import_module(module), name)(*job["argv"])
        else:
            memtrain.cli.main.main(job["argv"])
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)

for line in sys.stdin:
    job = json.loads(line)
    children = []
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            run(job, rank)
        children.append(child)
    print(json.dumps(children), flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""


class Forks:
    """`with Forks() as forks: job = forks.start([...]); forks.wait()`. One job at a time."""

    def __enter__(self) -> "Forks":
        self.going: list[int] = []
        self.server = subprocess.Popen(
            [sys.executable, "-c", _SERVER.format(root=str(ROOT))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, *_) -> None:
        self._end()
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

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
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        job = dict(
            argv=argv,
            function=f"{function.__module__}.{function.__qualname__}" if function else None,
            log=str(log),
            ranks=ranks,
            port=port,
            run_id=f"run-{port}",
            file_size=file_size,
            environment=environment,
        )
        self._end()
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.log = log
        self.going = json.loads(self.server.stdout.readline())
        return self.going

    def _end(self) -> None:
        """What a test that failed has left going on, stopped processes too."""
        for process in self.going:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if self.going:
            self.wait()

    def wait(self) -> list[int]:
        """Exit codes, by rank; minus its number where a signal ended one."""
        codes = json.loads(self.server.stdout.readline())
        self.going = []
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
        wait_until(lambda: condition() or any(map(ended, self.going)))
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
