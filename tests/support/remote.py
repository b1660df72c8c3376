"""Shards behind commands, the caches that hold them, and processes that fetch."""

import multiprocessing
import os
import random
import selectors
from pathlib import Path

from memtrain.data.remote import ShardCache
from tests.support.forks import PATIENCE

fork = multiprocessing.get_context("fork")  # as a loader makes its workers
MORE = 3 << 20  # bytes; a command that has written them has been read from, so that a part of them is on disk


class Source:
    """A shard behind a shell command that writes a line to a log each time it runs."""

    def __init__(self, folder: Path, name: str = "00000.tar", size: int = 1000):
        self.file, self.log = folder / name, folder / f"{name}.log"
        self.data = random.Random(name).randbytes(size)
        self.file.write_bytes(self.data)

    def url(self, then: str = "") -> str:
        return f"pipe:echo run >> {self.log}; cat {self.file}; {then}"

    def runs(self) -> int:
        return self.log.read_text().count("run") if self.log.exists() else 0


def cache_of(tmp_path: Path, max_bytes: int = 1 << 20, **options) -> ShardCache:
    return ShardCache(tmp_path / "cache", max_bytes, **(dict(backoff_s=0.001) | options))


def shards_in(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if not path.name.startswith(".")}


def parts_in(cache: ShardCache) -> list[Path]:
    return list(cache.folder.glob(".*.part"))


def started(work, *args) -> multiprocessing.Process:
    process = fork.Process(target=work, args=args, daemon=True)
    process.start()
    return process


def ended(process) -> int | None:
    process.join(PATIENCE)
    return process.exitcode


def fifo_in(folder: Path, name: str = "fifo") -> Path:
    os.mkfifo(folder / name)
    return folder / name


def hear(fifo: Path) -> None:
    """Wait until a command writes to it."""
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with selectors.DefaultSelector() as selector:  # unlike select.select not bound to descriptors below 1024
        selector.register(reader, selectors.EVENT_READ)
        heard = selector.select(PATIENCE)
    os.close(reader)
    assert heard
