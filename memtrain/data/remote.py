"""Remote shards, fetched whole into a bounded folder that all workers and ranks of a machine share.

A shard is there whole or not at all: it is written beside its place under a lock and moved there once the
opener has ended well. What was used longest ago goes first; whoever still has it open reads on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

from webdataset.gopen import Pipe, gopen, gopen_schemes, rewrite_url, set_options

from memtrain.data import stores
from memtrain.data.kept import locked

log = logging.getLogger(__name__)

_CREDENTIALS = re.compile(r"(://)(?:[^/\s'\"@?]*@)?([^\s'\"?]*)(?:\?[^\s'\"]*)?")  # USER:PASSWORD@, ?QUERY
_WHOLE = re.compile(r"[0-9a-f]{16}-")  # beginnings of our names: nothing else in the folder is ever removed
_PART = re.compile(r"\.[0-9a-f]{16}-.*\.part$")
_CHUNK = 1 << 20  # bytes
_CURL_EXITS = {
    6: "no such host",
    7: "no connection",
    18: "the body was cut short",
    22: "HTTP status of 400 or above",
    28: "timed out",
    56: "the connection broke",
}


class ShardMissing(OSError):
    """A remote shard that could not be fetched; the text is one line with the remedy."""


def shown(url: str) -> str:
    """The url as it may be logged: without user, password and query, a command cut at 100 characters."""
    text = _without_credentials(url)
    return text if len(text) <= 100 or not url.startswith("pipe:") else text[:99] + "…"


def _without_credentials(url: str) -> str:
    text = url if url.startswith("pipe:") else url.partition("?")[0]
    return " ".join(_CREDENTIALS.sub(r"\1\2", text).split())


class ShardCache:
    """Remote shards as files of one folder, which may be shared by any number of processes.

    The bound counts whole shards. For a while there may be more on disk: what is just being fetched, and
    what was evicted while a reader had it open. A path holds until others fetch `max_bytes` more, so open it
    at once, and fetch again should it be gone.

    What lies in an object store comes through fsspec, where that store's package is installed (`memtrain.data.stores`),
    all else through webdataset's `gopen`. As that runs curl, one try takes a minute where the server says 5xx (30
    retries, 2 s apart), a connection that stalls is waited for without end (`speed-time` in ~/.curlrc ends it), and a
    body that is cut short looks whole if it came without a Content-Length.

    Args:
        folder: made where missing.
        max_bytes: of the whole shards in it. One shard larger than that is kept alone.
        tries: of one fetch.
        backoff_s: seconds between the first try and the second; doubles with each.
    """

    def __init__(self, folder: Path, max_bytes: int, tries: int = 3, backoff_s: float = 1.0):
        if max_bytes <= 0:
            raise ValueError(
                f"data.cache_bytes must be > 0, got {max_bytes}; give the bytes that fetched shards may take"
            )
        if tries < 1:
            raise ValueError(f"tries must be >= 1, got {tries}; a shard that is never tried is never there")
        self.folder, self.max_bytes, self.tries, self.backoff_s = Path(folder), max_bytes, tries, backoff_s
        self._warned_of_size = False
        self._queue: SimpleQueue[str] | None = None
        self._queue_pid: int | None = None  # the process whose thread empties the queue

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_queue": None, "_queue_pid": None}

    def path(self, url: str) -> Path:
        """Where the shard lies when it is there; fetches nothing."""
        last = _without_credentials(url).removeprefix("pipe:").rstrip("/").rpartition("/")[2]
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", re.split(r"[\s'\"]", last)[0])[-80:]
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{readable}"

    def fetch(self, url: str) -> Path:
        """The shard's path, once it is whole on disk.

        Raises:
            ShardMissing: it could not be had in `tries` tries.
        """
        return self._fetch(url, self.tries)

    def prefetch(self, urls: Sequence[str]) -> None:
        """Have a thread fetch these, one after the other, each tried once; a failure is left to `fetch`."""
        if self._queue is None or self._queue_pid != os.getpid():  # a forked worker has the queue but not the thread
            self._queue, self._queue_pid = SimpleQueue(), os.getpid()
            threading.Thread(target=self._fetch_ahead, args=(self._queue,), daemon=True).start()
        for url in urls:
            self._queue.put(url)

    def _fetch_ahead(self, queue: SimpleQueue[str]) -> None:
        while True:
            url = queue.get()
            with contextlib.suppress(Exception):
                self._fetch(url, tries=1)

    def _fetch(self, url: str, tries: int) -> Path:
        path = self.path(url)
        if _touch(path):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        reason = ""
        for attempt in range(1, tries + 1):
            # here: nobody else fetches this shard; between tries others may
            with locked(_lock_of(path)):
                if _touch(path):
                    return path
                try:
                    self._fetch_once(url, path)
                    return path
                except OSError as error:
                    reason = one_line(error, url)
            log.warning("shard %s: try %d of %d failed: %s", shown(url), attempt, tries, reason)
            if attempt < tries:
                time.sleep(self.backoff_s * 2 ** (attempt - 1))
        raise ShardMissing(
            f"shard {shown(url)} was not fetched in {tries} tries: {reason}; "
            "see that it is still there and may be read, or take it out of data.shards"
        )

    def _fetch_once(self, url: str, path: Path) -> None:
        """Copy a shard beside its place and move it there; evict what is too much then."""
        part = _part_of(path)
        try:
            copy_url(url, part)
            size = part.stat().st_size
            _touch(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        if size > self.max_bytes and not self._warned_of_size:
            self._warned_of_size = True
            log.warning(
                "shard %s takes %d bytes, more than data.cache_bytes=%d: no other is kept beside it",
                shown(url), size, self.max_bytes,
            )  # fmt: skip
        self._evict(path)

    def _evict(self, newest: Path) -> None:
        """Unlink what was used longest ago until the bound holds, and what a dead process left unfinished."""
        whole: list[tuple[int, int, Path]] = []  # (last use in ns, bytes, path)
        for path in self.folder.iterdir():
            if _PART.match(path.name):
                # its owner would hold the lock
                with contextlib.suppress(BlockingIOError), locked(path.with_suffix(".lock"), fcntl.LOCK_NB):
                    path.unlink(missing_ok=True)
            elif _WHOLE.match(path.name):
                with contextlib.suppress(FileNotFoundError):  # another process evicts, too
                    stat = path.stat()
                    whole.append((stat.st_mtime_ns, stat.st_size, path))
        excess = sum(size for _, size, _ in whole) - self.max_bytes
        for _, size, path in sorted(whole):
            if excess <= 0:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                excess -= size


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _touch(path: Path) -> bool:
    """Mark a shard as used now. False where it is not there."""
    now = time.time_ns()  # the kernel's own time moves in steps of some ms
    try:
        os.utime(path, ns=(now, now))
    except FileNotFoundError:
        return False
    return True


def _is_for_fsspec(url: str) -> bool:
    """Whether fsspec fetches it: webdataset goes first where it was told to rewrite it, or how to open s3://."""
    return stores.is_store(url) and "s3" not in gopen_schemes and rewrite_url(url) == url


def _open(url: str) -> BinaryIO | Pipe:
    """Open a URL with webdataset's opener, which knows no s3://; its rewriting and its USE_AIS_FOR=s3 go first."""
    if url.startswith("s3://") and "s3" not in gopen_schemes and rewrite_url(url) == url:
        if shutil.which("aws") is None:
            raise OSError(f"s3:// takes {stores.remedy(url)}, or the command aws")
        url = f"pipe:aws s3 cp {shlex.quote(url)} -"
    try:
        return gopen(url)
    except ValueError as error:
        raise OSError(f"webdataset cannot open it ({error}); a pipe:COMMAND opens anything") from None


def copy_url(url: str, part: Path) -> None:
    """Write all that the opener gives to the file `part`.

    Raises:
        OSError: it ended with any status but 0, the store or the disk refused.
    """
    if _is_for_fsspec(url):
        stores.download(url, part)
        return
    stream = _open(url)
    # gopen takes 23 and 141 for success, under GOPEN_VERBOSE every status; its errors hold the whole command
    set_options(stream, ignore_errors=True)
    try:
        with part.open("wb") as file:
            shutil.copyfileobj(stream, file, _CHUNK)
    except BaseException:
        if isinstance(stream, Pipe):
            stream.proc.kill()  # or close() waits for a body that nobody reads
        raise
    finally:
        stream.close()
    if isinstance(stream, Pipe) and stream.status != 0:
        curl = isinstance(stream.proc.args, list) and stream.proc.args[0] == "curl"
        meaning = _CURL_EXITS.get(stream.status) if curl else None
        raise OSError(
            f"{'curl' if curl else 'the command'} ended with status {stream.status}"
            + (f" ({meaning})" if meaning else "")
        )


def one_line(error: OSError, url: str) -> str:
    """What an error says, on one line and without credentials."""
    text = str(error).replace(url, shown(url))
    return " ".join(_CREDENTIALS.sub(r"\1\2", text).split())
