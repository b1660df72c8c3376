"""A process that has imported everything, and makes a fork of itself for each who connects to its socket.

A request is one message: JSON with the keys of `Request`, and the descriptors of the files that it is to have open.
The server answers with the process' id, and with its exit code once it has ended; where the connection is closed
the process is killed, if it goes on, and forgotten. The server ends when its lifeline does: a pipe
whose other end whoever made it holds.
"""

import atexit
import fcntl
import gc
import importlib
import json
import logging
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from typing import NoReturn, TypedDict

import torch

MESSAGE = 1 << 20  # bytes, at most
FILES = 64  # a request's, at most


class Request(TypedDict):
    """What a child is to do.

    `module` runs as `python -m` runs it; `function` is called with the arguments. `executable` is what it takes for
    its Python. No file that it writes may be larger than `file_size` bytes; 0: any may.
    """

    module: str | None
    function: str | None
    arguments: list
    environment: dict[str, str]
    folder: str
    executable: str
    file_size: int
    files: list[int]  # as which the descriptors are known there


IMPORTED = """
    memtrain.callbacks.canaries memtrain.callbacks.copies memtrain.callbacks.curves memtrain.callbacks.export
    memtrain.callbacks.ledger memtrain.callbacks.logging memtrain.callbacks.memorized_table memtrain.callbacks.report
    memtrain.callbacks.sample_grid memtrain.callbacks.summary memtrain.callbacks.validation memtrain.cli.evaluate
    memtrain.cli.jobs memtrain.cli.main memtrain.cli.schema memtrain.cli.sweep memtrain.cli.train memtrain.core.evidence
    memtrain.models.pretrained memtrain.models.stable_diffusion memtrain.report.page memtrain.sweep.study
    memtrain.training.checkpoint memtrain.training.checks memtrain.training.signals
    PIL.JpegImagePlugin diffusers.guiders diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
    hydra._internal.core_plugins.basic_launcher lightning_fabric.utilities.rank_zero matplotlib.backends.backend_agg
    multiprocessing.spawn optuna.storages pyarrow.dataset torch.distributed.algorithms.ddp_comm_hooks
    torch.utils.serialization.config transformers.conversion_mapping transformers.models.clip.image_processing_pil_clip
    transformers.models.clip.tokenization_clip wandb
"""
EXTRAS = "joblib submitit hydra_plugins.hydra_joblib_launcher hydra_plugins.hydra_submitit_launcher"


def import_everything() -> None:
    """What a training, a job of Hydra's launchers or a test's own function imports."""
    for name in IMPORTED.split():
        importlib.import_module(name)
    for name in EXTRAS.split():
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    importlib.import_module("hydra.core.plugins").Plugins.instance()  # looks for them once
    importlib.import_module("memtrain.cli.main").composed("train", ["experiment=demo_noto", "name=a", "seed=3"])
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("clip_text_model")
    gc.freeze()  # children need not look through all of this for garbage, and copy its pages


def become(request: Request, files: list[int]) -> None:
    """Takes this child's place in the world: its files, environment, folder and names."""
    os.setpgid(0, 0)
    files = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 512) for file in files]
    for file, place in zip(files, request["files"], strict=True):
        os.dup2(file, place)
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path.insert(0, request["folder"])
    sys.executable = request["executable"]
    importlib.import_module("multiprocessing.spawn").set_executable(request["executable"])
    ranks = importlib.import_module("lightning_fabric.utilities.rank_zero")
    ranks.rank_zero_only.rank = ranks._get_rank() or 0
    if request["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)


def work(request: Request) -> int:
    """Does what was asked for; the exit code."""
    try:
        if request["function"]:
            module, _, name = request["function"].rpartition(".")
            getattr(importlib.import_module(module), name)(*request["arguments"])
        else:
            sys.argv = [request["module"], *request["arguments"]]
            sys.modules.pop(request["module"], None)  # it is __main__ now
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def spawned(tracker: int, pipe: int) -> None:
    """The life of a process that multiprocessing spawns, told by this pipe what it is to do."""
    sys.argv = ["-c", "--multiprocessing-fork"]
    importlib.import_module("multiprocessing.spawn").spawn_main(pipe_handle=pipe, tracker_fd=tracker)


def execute(code: str) -> None:
    """What `python -c` does."""
    exec(code, {"__name__": "__main__"})


def live(listener: socket.socket, lifeline: int) -> NoReturn:
    """The life of a server, which has just been forked."""
    try:
        atexit._clear()  # what is to be done at the other process' end
        nothing = os.open(os.devnull, os.O_RDWR)
        for file in (0, 1):
            os.dup2(nothing, file)
        importlib.reload(warnings)  # those of pytest are errors
        logging.getLogger().handlers.clear()  # nor is this process' log pytest's
        torch.set_num_threads(1)
        import_everything()
        serve(listener, lifeline)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # there is nothing to tidy up


def serve(listener: socket.socket, lifeline: int) -> None:
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(lifeline, selectors.EVENT_READ)
    going: dict[socket.socket, int] = {}  # and not said to have ended
    known: dict[socket.socket, int] = {}
    while True:
        for key, _ in selector.select(0.02):
            if key.fileobj == lifeline:
                for child in known.values():
                    os.kill(child, signal.SIGKILL)
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                message, files, _, _ = socket.recv_fds(connection, MESSAGE, FILES)
                child = os.fork()
                if child == 0:
                    selector.close()
                    os.close(lifeline)
                    for each in (listener, connection, *known):
                        each.close()
                    return run(json.loads(message), files)
                for file in files:
                    os.close(file)
                going[connection] = known[connection] = child
                selector.register(connection, selectors.EVENT_READ)
                with suppress(BrokenPipeError):
                    connection.send(b"%d\n" % child)
            else:
                connection = key.fileobj
                selector.unregister(connection)
                connection.close()
                going.pop(connection, None)
                os.kill(known[connection], signal.SIGKILL)  # one that has ended is there until it is waited for
                os.waitpid(known.pop(connection), 0)
        for connection, child in list(going.items()):
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                del going[connection]
                code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                with suppress(BrokenPipeError):
                    connection.send(b"%d\n" % code)


def run(request: Request, files: list[int]) -> None:
    """The life of a child."""
    code = 1
    try:
        become(request, files)
        code = work(request)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(code)
