"""Checkpoints that resume."""

from __future__ import annotations

from pytorch_lightning.callbacks import ModelCheckpoint


def checkpoint(every: int, folder: str) -> ModelCheckpoint:
    """`last.ckpt` every `every` optimizer steps, at the end and where the run breaks off.

    It holds trained weights, optimizer, EMA, rule and position.
    """
    if every < 1:
        raise ValueError(f"callbacks.checkpoint.every must be >= 1, got {every}")
    return ModelCheckpoint(
        dirpath=folder,
        filename="last",
        every_n_train_steps=every,
        save_top_k=1,
        save_on_train_epoch_end=True,
        save_on_exception=True,
        enable_version_counter=False,
    )
