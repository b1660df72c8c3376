"""The finished model, or the finished adapter, for diffusers."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch

from memtrain.callbacks.guard import on_first_rank

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Export(pl.Callback):
    """Writes `export/` with the averaged weights at the end, before anything is drawn; for `from_pretrained`, or of an
    adapter for `load_lora_weights`."""

    def __init__(self, dtype: str):
        if dtype not in DTYPES:
            raise ValueError(f"callbacks.export.dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        self.dtype = DTYPES[dtype]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with pl_module.averaged_weights():
            self._write(trainer, pl_module)

    @on_first_rank
    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.export(Path(trainer.default_root_dir) / "export", self.dtype)
