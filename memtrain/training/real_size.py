"""What `memtrain bench real_size` trains, and what it sees of the run from within.

`python -m memtrain.training.real_size make|needed ARCHITECTURE RESOLUTION FOLDER`: a process of its own, whose memory
is given back.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from memtrain.data.bench import write_photos
from memtrain.models.adapters import Adapter
from memtrain.models.folders import trained
from memtrain.training.architectures import architecture
from memtrain.training.memory import measure
from memtrain.training.optimizers import AdamW

NEEDS, MODEL, SHARDS = "needs.json", "model", "shards"  # in the folder of the bench


def needed(pretrained: str, resolution: int, folder: Path) -> None:
    """Write down what training such a model in float32, one picture at a time, must hold, from its configs alone."""
    model = architecture(pretrained, trained("auto")).model()
    model.make_trainable(False, gradient_checkpointing=True, channels_last=False, compile=False)
    adamw = AdamW(1e-5, (0.9, 0.999), 0.01, 1e-8, "constant", 0, eight_bit=False)
    found = measure(
        model, Adapter(), adamw, resolution=resolution, batch_size=1, ema=True, dtype=torch.float32,
        gradient_checkpointing=True,
    )  # fmt: skip
    parts = {"weights": sum(found.weights.values()), "gradients": found.gradients, "two moments": found.optimizer}
    parts |= {"average": found.average, "activations": found.activations}
    (folder / NEEDS).write_text(json.dumps({"trained": found.trained, "parts": parts}))


def make(pretrained: str, resolution: int, folder: Path) -> None:
    """Write a pipeline of this architecture with random weights, and shards of a few pictures."""
    torch.manual_seed(0)  # the weights' initialisation takes no generator
    architecture(pretrained, trained("auto")).model("cpu").export(folder / MODEL, torch.float32)
    write_photos(folder / SHARDS, 2, 8, resolution * 5 // 4, resolution * 5 // 4)


class Marks(pl.Callback):
    """Appends a line to a file whenever a run comes to where a phase of it begins or ends: what, the time, and the most
    memory that was taken on the GPU so far, in bytes.

    Args:
        path: of the file.
    """

    def __init__(self, path: str):
        self.path = Path(path)

    def _mark(self, event: str) -> None:
        taken = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "time": time.time(), "gpu": taken}) + "\n")

    def on_train_batch_start(self, *args: Any) -> None:
        self._mark("step begins")

    def on_train_batch_end(self, *args: Any) -> None:
        self._mark("step ends")

    def on_save_checkpoint(self, *args: Any) -> None:
        self._mark("checkpoint begins")

    def on_train_end(self, *args: Any) -> None:
        self._mark("run ends")


if __name__ == "__main__":
    what, architecture_of, px, into = sys.argv[1:]
    {"make": make, "needed": needed}[what](architecture_of, int(px), Path(into))
