"""Checkpoints that resume."""

from __future__ import annotations

import errno
import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor
from torch.utils._pytree import tree_map_only

from memtrain.core.files import written_aside
from memtrain.data.canaries_digest import canaries_digest
from memtrain.data.datamodule import data_of
from memtrain.training.module import DiffusionTraining
from memtrain.training.resume import LAST, RunState, checkpoint_name, checkpoints_in

log = logging.getLogger(__name__)

_COPIED = ("ema", "exclusion", "scores")  # parts of memtrain's own state that `load_state_dict` copies into place


class Checkpoints(Checkpoint):
    """Writes a checkpoint every `every` optimizer steps, at the end, and where the run is stopped; `keep` stay.

    It holds trained weights, optimizer, EMA, rule, remembered scores, position, random state and the W&B id.
    `last.ckpt` is a link to the newest. Where one of several ranks breaks off alone, nothing is written: what
    the others know of the step is not that of the same moment. Where all do, as at a shard that is gone, the step
    before is written. Lightning calls this after all other callbacks.
    """

    def __init__(self, every: int, folder: str, keep: int):
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"callbacks.checkpoint.{name} must be >= 1, got {value}")
        self.every, self.folder, self.keep = every, Path(folder), keep
        self.saved_at: int | None = None  # step; None: the run has not begun, and there is nothing to save
        self.run_ended = False
        self.wandb_id: str | None = None
        self.random_state: dict[str, Any] | None = None  # of the run that is resumed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = AsideIO()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved_at = trainer.global_step
        if self.random_state is not None:
            set_random_state(self.random_state)
        if trainer.is_global_zero:
            ids = [logger.version for logger in trainer.loggers if isinstance(logger, WandbLogger)]
            self.wandb_id = ids[0] if ids else self.wandb_id
            self._write_state(trainer, finished_at=None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.saved_at:
            return  # in the middle of an accumulation window
        assert isinstance(pl_module, DiffusionTraining)
        stop = pl_module.stops.reason
        if stop is not None or trainer.global_step % self.every == 0:
            self._save(trainer)
        if stop is not None:
            log.info("stopped after step %d; `resume=auto` goes on from there", trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self.saved_at:
            self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, DiffusionTraining)
        alike = trainer.world_size == 1 or exception is pl_module.stops.reason
        has_news = self.saved_at is not None and trainer.global_step != self.saved_at
        if alike and has_news and _is_between_steps(trainer, pl_module):
            self._save(trainer)
            trainer.strategy.barrier()  # a launcher ends the other ranks once the first of them is gone

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.run_ended = True
        if trainer.is_global_zero:
            self._write_state(trainer, finished_at=trainer.global_step, stopped_early=trainer.should_stop)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a run that was stopped between its last step and its end, which Lightning finds nothing to do in."""
        if self.run_ended:
            return
        pl_module.to(trainer.strategy.root_device)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # Lightning sets it from outside
        for callback in callbacks:
            callback.on_train_start(trainer, pl_module)
        for callback in callbacks:
            callback.on_train_end(trainer, pl_module)

    def _write_state(self, trainer: pl.Trainer, finished_at: int | None, stopped_early: bool = False) -> None:
        """Write `run.json`: what a later run must know of this one beside the checkpoint."""
        data = data_of(trainer)
        state = RunState(
            self.wandb_id,
            finished_at,
            data.global_batch_size,
            canaries_digest(data.groups, data.samples),
            stopped_early=stopped_early,
        )
        state.write(trainer.default_root_dir)

    def _save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint of this step; the first rank then links `last.ckpt` to it and deletes those too many."""
        path = self.folder / checkpoint_name(trainer.global_step)
        trainer.save_checkpoint(path)
        self.saved_at = trainer.global_step
        if trainer.is_global_zero:
            with written_aside(self.folder / LAST) as aside:
                aside.symlink_to(path.name)
            there = checkpoints_in(self.folder)  # those of later steps could not be read, or are of another past
            past = [old for step, old in there.items() if step <= trainer.global_step]
            for old in set(there.values()) - set(past[-self.keep :]):
                old.unlink()

    # ---- what the checkpoint holds beside model, optimizer and data

    def state_dict(self) -> dict[str, Any]:
        return {"wandb_id": self.wandb_id, "random": get_random_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wandb_id, self.random_state = state_dict["wandb_id"], state_dict["random"]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Count micro-batches by what this run accumulates, from the beginning of an optimizer step."""
        steps, loop = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
        done = steps * trainer.accumulate_grad_batches
        batches = dict(ready=done, started=done, processed=done, completed=done - 1)  # as in on_train_batch_end
        loop["epoch_loop.batch_progress"] |= {"total": batches, "current": dict(batches), "is_last_batch": False}
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1
        epoch = dict(ready=1, started=1, processed=0, completed=0)  # the order of samples is endless
        loop["epoch_progress"] |= {"total": epoch, "current": dict(epoch)}


def checkpoint(every: int, folder: str, keep: int = 2) -> Checkpoints:
    """Build the callback that the config calls `callbacks.checkpoint`."""
    return Checkpoints(every, folder, keep)


class AsideIO(TorchCheckpointIO):
    """Writes a checkpoint beside its file, in the same folder, and renames it: a file under its name is whole.

    What is read of it as it is copied into place, weights, their average, and what is kept of every sample, never takes
    memory of its own.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_aside(path) as aside, aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            cause = _os_error(error)
            if cause is None:
                raise
            number = cause.errno or errno.ENOSPC
            raise OSError(number, f"the checkpoint could not be written ({os.strerror(number)})", str(path)) from None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)
        state = checkpoint.get("memtrain", {})
        copied = {part: state.pop(part) for part in _COPIED if part in state}
        kept = {part: value for part, value in checkpoint.items() if part != "state_dict"}
        # the file may be deleted or replaced while the run goes on: what is held on to is not left in it
        checkpoint |= tree_map_only(Tensor, Tensor.clone, kept)
        if copied:
            checkpoint["memtrain"] |= copied
        return checkpoint


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error that torch's writer hides behind one of its own; None: it hides none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _is_between_steps(trainer: pl.Trainer, pl_module: DiffusionTraining) -> bool:
    """Whether weights, average, rule, schedule and position are those of one step."""
    (schedule,) = trainer.lr_scheduler_configs
    return not pl_module.accumulation.mid_step and schedule.scheduler.last_epoch == trainer.global_step


def get_random_state() -> dict[str, Any]:
    """The state of this process's random generators, in types that load without pickle."""
    version, internal, gauss = random.getstate()
    of_numpy = np.random.get_state(legacy=True)
    assert isinstance(of_numpy, tuple)
    kind, keys, *rest = of_numpy
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Give this process's random generators the state that `get_random_state` found."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])
