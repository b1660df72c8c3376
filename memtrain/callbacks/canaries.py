"""The list of a run's canaries, `canaries.csv`."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytorch_lightning as pl

from memtrain.core.exclusion import CANARY, GROUP_NAMES, REFERENCE, SACRIFICED
from memtrain.data.escaping import as_cell, as_text
from memtrain.data.groups import HELD_OUT

_AT_ONCE = 32


class CanaryList(pl.Callback):
    """Writes at the start of a run who all canaries and the reference set are: `canaries.csv`.

    Of a canary with duplicates, one sample is listed.

    Args:
        reference: at most so many of the reference set, with captions; the others have none, and the group `held_out`.
    """

    def __init__(self, reference: int):
        if reference < 0:
            raise ValueError(f"callbacks.canaries.reference must be >= 0, got {reference}")
        self.reference = reference

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        groups = data.groups

        def keys(positions: np.ndarray) -> list[str]:
            return [as_text(data.samples.key(int(position))) for position in positions]

        rows = [
            (key, as_text(caption), GROUP_NAMES[number])
            for number, positions in (
                (CANARY, groups.one_each(groups.canary)),
                (SACRIFICED, groups.one_each(groups.sacrificed)),
                (REFERENCE, groups.reference[: self.reference]),
            )
            for first in range(0, len(positions), _AT_ONCE)
            for key, caption in zip(
                keys(positions[first : first + _AT_ONCE]),
                data.decode(positions[first : first + _AT_ONCE]).captions,
                strict=True,
            )
        ]
        rows += [(key, "", HELD_OUT) for key in keys(groups.reference[self.reference :])]
        path = Path(trainer.default_root_dir) / "canaries.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("key", "caption", "group"))
            writer.writerows(map(as_cell, row) for row in rows)
