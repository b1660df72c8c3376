"""Checkpoints that resume."""

from __future__ import annotations

from pytorch_lightning.callbacks import ModelCheckpoint


def checkpoint(every: int, folder: str) -> ModelCheckpoint:
    """`last.ckpt` every `every` optimizer steps and at the end: trained weights, optimizer, EMA, rule, position."""
    if every < 1:
        raise ValueError(f"callbacks.checkpoint.every must be >= 1, got {every}")
    return ModelCheckpoint(
        dirpath=folder,
        filename="last",
        every_n_train_steps=every,
        save_top_k=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
