"""A score during which the first worker that computes it is killed."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from memtrain.audit.denoiser import Denoiser
from memtrain.audit.detect.scores import Magnitude, ScoredStep


@dataclass(frozen=True)
class KilledOnce(Magnitude):
    mark: Path = field(default=Path(), repr=False)  # a file that the first one leaves

    def at(self, denoiser: Denoiser, step: ScoredStep) -> Tensor:
        if not self.mark.exists():
            self.mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().at(denoiser, step)


def loaded(pipeline: str, mark: Path) -> tuple[Denoiser, list[KilledOnce]]:
    return Denoiser.load(pipeline), [KilledOnce(mark)]
