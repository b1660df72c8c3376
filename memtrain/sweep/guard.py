"""`python guard.py LOG COMMAND…`: a trial as a process group of its own, which ends with the sweep that started it.

The sweep holds the other end of our stdin. When it closes that, or is gone, killed or not, the whole group is told
to end, and killed if it does not. Standard library alone: this process lives as long as the trial, whatever signal
it gets; a scheduler sends one to every process of a job, so then the group knows, and is not told again: memtrain
takes a second signal as the wish to end without a checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import BinaryIO

GRACE = 60.0  # s between SIGTERM and SIGKILL, for a checkpoint
_told = threading.Event()


def _end(group: int, number: int) -> None:
    """Send a signal to a process group that may have ended."""
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.killpg(group, number)


def _end_with_the_sweep(group: int) -> None:
    """Wait until the sweep lets go of our stdin, then end the group; runs in a thread of its own."""
    while os.read(0, 1):
        pass
    if not _told.is_set():
        _end(group, signal.SIGTERM)
    time.sleep(GRACE)
    _end(group, signal.SIGKILL)


def _wait_for_the_folder(log: BinaryIO) -> None:
    """Wait until the trial that a killed sweep left in this folder has ended: two would write the same files."""
    said = False
    while True:
        try:
            return fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said:
                said = True
                print("waiting for the trial that still ends in this folder", file=sys.stderr, flush=True)
            if select.select([0], [], [], 0.2)[0]:  # the sweep has let go
                sys.exit(128 + signal.SIGTERM)
        except OSError:
            return  # a file system without locks


def main(log: str, command: list[str]) -> None:
    """Run the command as a trial whose log is `log`, and exit with its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda number, frame: _told.set())
    with open(log, "ab") as held:
        _wait_for_the_folder(held)
        trial = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        threading.Thread(target=_end_with_the_sweep, args=(trial.pid,), daemon=True).start()
        code = trial.wait()
        _end(trial.pid, signal.SIGKILL)  # ranks and workers that outlived their first process
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
