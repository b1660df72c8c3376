"""Signals end a run at the next step boundary, with a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import ParallelStrategy

from memtrain.training.exit_codes import EXIT_CODES
from memtrain.training.module import DiffusionTraining

log = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], Any] | int | None  # as `signal.signal` takes and gives it
_ONE_SIGNAL = 1.0  # seconds; a scheduler may deliver one to the process and to its group


class Signals(pl.Callback):
    """Ends a run at SIGTERM, SIGINT, SIGUSR1 or SIGUSR2: the optimizer step is finished, a checkpoint written.

    The exit code is that of `EXIT_CODES`. A signal that reaches one rank ends all at the same step. A second
    one exits at once, also out of a collective that never returns; so does the first before and after training,
    when there is no step to finish. Comes first of the callbacks, so that their work at the end can be broken off.

    `with signals:` around the training leaves the handlers as they were; Lightning's teardown brings ours back.
    """

    def __init__(self) -> None:
        self.is_training = False
        self.listening = False
        self.process = os.getpid()
        self.before: dict[int, Handler] = {}

    def __enter__(self) -> Signals:
        return self

    def __exit__(self, *_: object) -> None:
        self._hand_back()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, DiffusionTraining)
        self.trainer, self.stops = trainer, pl_module.stops
        if threading.current_thread() is threading.main_thread():  # nobody else may
            arrived, arriving = socket.socketpair()
            arriving.setblocking(False)
            self.before_wakeup = signal.set_wakeup_fd(arriving.fileno(), warn_on_full_buffer=False)
            self.arriving = arriving
            threading.Thread(target=self._watch, args=(arrived,), daemon=True, name="signals").start()
            self._listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.listening:
            self._listen()  # Lightning's own handler for SIGTERM broadcasts, and hangs where one rank alone is told
        self.is_training = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.is_training = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.is_training = False
        if isinstance(exception, SystemExit) and not _speaks(trainer, exception is self.stops.reason):
            exception.code = 0  # at another, launchers kill the ranks that are still writing, the first among them
            if self.listening:  # as they do, too, when the first has ended with its own
                self.before[signal.SIGTERM] = signal.SIG_IGN
        self._restore()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore()

    def _listen(self) -> None:
        """Put our handlers in the place of those that are there, which are remembered."""
        for number in EXIT_CODES:
            before = signal.signal(number, self._receive)
            self.before.setdefault(number, before)
        self.listening = True

    def _restore(self) -> None:
        """Put the earlier handlers back and end the thread that watches."""
        self._hand_back()
        if self.listening:
            signal.set_wakeup_fd(self.before_wakeup)
            self.arriving.close()  # ends the thread
            self.listening = False

    def _hand_back(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal, in the main thread, when Python has the word again; exit if no step is going on."""
        if os.getpid() != self.process:
            return  # a decoding process: the one that it works for decides
        received = signal.Signals(number)
        if not self.is_training:
            sys.exit(EXIT_CODES[received])
        if self.stops.received is None:
            self.stops.received = received
            log.warning(
                "%s: this step is finished, a checkpoint written, then the run ends; again to end at once",
                received.name,
            )

    def _watch(self, arrived: socket.socket) -> None:
        """Exit at the second signal, whatever the main thread waits for; runs in a thread of its own."""
        first, at = None, 0.0
        while numbers := arrived.recv(1):
            if numbers[0] not in EXIT_CODES:
                continue
            number = signal.Signals(numbers[0])
            if first is None:
                first, at = number, time.monotonic()
            elif number != first or time.monotonic() - at > _ONE_SIGNAL:
                launcher = self.trainer.strategy.launcher
                if launcher is not None:
                    launcher.kill(signal.SIGKILL)  # the ranks that Lightning has started would wait for this one
                os._exit(EXIT_CODES[number])
        arrived.close()


def _speaks(trainer: pl.Trainer, agreed: bool) -> bool:
    """Whether this rank's exit code counts. Where all end, that of the first does; torchrun's agents want one each."""
    if trainer.world_size == 1 or trainer.is_global_zero:
        return True
    assert isinstance(trainer.strategy, ParallelStrategy)
    environment = trainer.strategy.cluster_environment
    assert environment is not None
    if isinstance(environment, TorchElasticEnvironment):
        return not agreed or trainer.local_rank == 0
    return not agreed and environment.creates_processes_externally
