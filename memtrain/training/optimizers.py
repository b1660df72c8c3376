"""AdamW and the learning rate over steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("constant", "cosine", "one_cycle")


def learning_rate_factor(step: int, schedule: str, warmup_steps: int, num_steps: int) -> float:
    """Share of the full rate at `step`: a linear (one_cycle: cosine) rise over `warmup_steps`, then constant,
    or falling along a cosine to 0 at `num_steps` (Loshchilov & Hutter 2017; one_cycle after Smith 2018)."""
    if step < warmup_steps:
        rise = (step + 1) / (warmup_steps + 1)
        return (1 - math.cos(math.pi * rise)) / 2 if schedule == "one_cycle" else rise
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return (1 + math.cos(math.pi * min(1.0, progress))) / 2


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with a schedule; `eight_bit` needs bitsandbytes.

    `warmup_steps` below 1 is a share of the run.
    """

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    eps: float
    schedule: str
    warmup_steps: float
    eight_bit: bool

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr must be > 0, got {self.lr:g}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule}")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must be >= 0, got {self.warmup_steps}")

    def build(self, parameters: Iterable[nn.Parameter], num_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimizer of these weights, and its learning rate over a run of `num_steps`."""
        kind = _eight_bit_adamw() if self.eight_bit else torch.optim.AdamW
        first, second = self.betas  # a config gives a list
        optimizer = kind(parameters, lr=self.lr, betas=(first, second), weight_decay=self.weight_decay, eps=self.eps)
        # the schedule counts steps, those that the fp16 scaler skips too
        warnings.filterwarnings("ignore", r"Detected call of .lr_scheduler\.step\(\). before", UserWarning)
        warmup = round(self.warmup_steps * num_steps) if self.warmup_steps < 1 else int(self.warmup_steps)
        return optimizer, LambdaLR(optimizer, lambda step: learning_rate_factor(step, self.schedule, warmup, num_steps))


def _eight_bit_adamw() -> type[torch.optim.AdamW]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError(
            "optimizer=adamw8bit needs bitsandbytes: pip install bitsandbytes, or use optimizer=adamw"
        ) from None
    return AdamW8bit
