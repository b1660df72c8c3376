"""`python -IS fork_client.py SOCKET EXECUTABLE ARGUMENTS`: does what `python ARGUMENTS` does, without its imports.

`-m MODULE …` of the modules below, which import much, runs in a child of tests/support/fork_server.py, with the
environment, folder, open files and signals of this process, and so does a process that multiprocessing spawns and
`-c CODE` that imports torch; all else in Python itself.
"""

import json
import os
import re
import signal
import socket
import sys

SLOW = (
    "memtrain.cli.main",
    "memtrain.training.real_size",
    "memtrain.training.step_clock",
    "tests.support.slow_to_end",
    "joblib.externals.loky.backend.popen_loky_posix",
    "submitit.core._submit",
)


def work_of(words: list[str]) -> dict | None:
    """The part of a request that says what a fork is to do; None: that is Python's own work."""
    if words[:1] == ["-m"] and words[1] in SLOW:
        return dict(module=words[1], function=None, arguments=words[2:])
    called = dict(module=None, function="tests.support.fork_server.execute", arguments=words[1:])
    if words[:1] == ["-c"] and words[1].startswith("import torch"):
        return called
    spawned = re.search(r"spawn_main\(tracker_fd=(\d+), pipe_handle=(\d+)\)", " ".join(words))
    numbers = [int(number) for number in spawned.groups()] if spawned else []
    return called | dict(function="tests.support.fork_server.spawned", arguments=numbers) if spawned else None


def main(address: str, executable: str, *arguments: str) -> None:
    asked = work_of([word for word in arguments if word != "-u"])
    if asked is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    files = [int(name) for name in os.listdir("/proc/self/fd")]
    files = [file for file in files if _is_inherited(file)]
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(address)
    request = asked | dict(
        environment=dict(os.environ), folder=os.getcwd(), executable=executable, file_size=0, files=files
    )
    told = []
    handed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
    for number in handed_on:
        signal.signal(number, lambda number, frame: told.append(number))  # until there is somebody to tell
    socket.send_fds(server, [json.dumps(request).encode()], files)
    child = int(server.recv(64))
    for number in handed_on:
        signal.signal(number, lambda number, frame: os.kill(child, number))
    for number in told:
        os.kill(child, number)
    for file in files:
        if file > 2:
            os.close(file)  # who waits for the other end to be closed waits for the child
    code = int(server.recv(64))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _is_inherited(file: int) -> bool:
    try:
        return os.get_inheritable(file)
    except OSError:  # that of the listing itself
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
