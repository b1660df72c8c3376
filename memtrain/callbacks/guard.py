"""One callback's failure loses nothing of the others."""

from __future__ import annotations

import errno
import functools
import logging
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import pytorch_lightning as pl

from memtrain.training.exit_codes import INCOMPLETE

log = logging.getLogger(__name__)

_MIDDLE, _END = "on_train_batch_end", "on_train_end"  # what is wrong at the start should end the run
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ALONE = "_raised_where_nobody_waits"


def on_first_rank(method: Callable) -> Callable:
    """Mark the part of a callback's work that the first rank does alone, files and pictures; no other waits for it.

    Calls the method, whose first argument is the trainer, on the first rank, and marks what it raises.
    """

    @functools.wraps(method)
    def alone(self, trainer: pl.Trainer, *arguments) -> None:
        if not trainer.is_global_zero:
            return
        try:
            method(self, trainer, *arguments)
        except Exception as error:
            setattr(error, _ALONE, True)
            raise

    return alone


class Guard:
    """Lets a run go on where one of its callbacks fails in a look at the run or at its end.

    The failure's traceback goes into `run.log`, one line to the terminal, and the run ends with an exit code that
    says so, when all that could be saved is. What fails before the first step ends the run, and so does a full disk
    in the middle: the run goes on from its last checkpoint when there is space. Of several ranks, only what the first
    does alone (`on_first_rank`) may fail: elsewhere the others would wait for one that goes on.

    Args:
        callbacks: that look at the run.
        records: those whose work in the middle may not have gaps, and fails the run; they are let off at the end.
    """

    def __init__(self, callbacks: Iterable[pl.Callback], records: Iterable[pl.Callback] = ()):
        self.failed: dict[str, str] = {}  # callback and what was wrong -> where it was first
        watched = [(callback, hook) for callback in callbacks for hook in (_MIDDLE, _END)]
        for callback, hook in [*watched, *((record, _END) for record in records)]:
            setattr(callback, hook, self._watched(callback, hook))

    def _watched(self, callback: pl.Callback, name: str) -> Callable:
        """The callback's hook of this name, whose failure is noted where the run can go on."""
        hook = getattr(callback, name)

        @functools.wraps(hook)
        def watched(trainer: pl.Trainer, *arguments, **named) -> None:
            try:
                hook(trainer, *arguments, **named)
            except Exception as error:
                others_wait = trainer.world_size > 1 and not getattr(error, _ALONE, False)
                if others_wait or (name == _MIDDLE and getattr(error, "errno", None) in _FULL):
                    raise
                self._note(trainer, type(callback).__name__, error)

        return watched

    def _note(self, trainer: pl.Trainer, name: str, error: Exception) -> None:
        """Remember a failure and say it, once: a line on the terminal, the traceback in `run.log`."""
        said = " ".join(f"{type(error).__name__}: {error}".split())
        if f"{name}: {said}" in self.failed:
            return  # at every look the same
        self.failed[f"{name}: {said}"] = f"step {trainer.global_step}"
        try:
            log.error("%s failed at step %d, the run goes on: %s", name, trainer.global_step, said)
            with Path(trainer.default_root_dir, "run.log").open("a", encoding="utf-8") as file:
                file.write("".join(traceback.format_exception(error)))
        except OSError:  # a full disk, it may be, which is what failed
            log.error("its traceback could not be written: %s", said)

    def end(self, run_dir: Path, is_job: bool) -> None:
        """Exit with `INCOMPLETE` where something failed. A job of -m raises ValueError: the others are to go on."""
        if not self.failed:
            return
        names = ", ".join(dict.fromkeys(failure.split(":")[0] for failure in self.failed))
        said = f"trained and saved, but {names} failed; {run_dir / 'run.log'} tells why"
        if is_job:
            raise ValueError(said)
        log.error("%s", said)
        raise SystemExit(INCOMPLETE)
