"""Optimizers, each with its learning rate over steps."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("constant", "cosine", "one_cycle")
_OTHERWISE = {"lr", "fused"}  # the schedule says the rate of a step; how it is computed stays what it was


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


class OptimizerConfig(ABC):
    """What `optimizer=` chooses: a dataclass with the settings of one optimizer.

    `warmup_steps` below 1 is a share of the run.
    """

    averages = False  # it keeps an average of the weights, by which it is to be judged
    lr: float
    schedule: str
    warmup_steps: float

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr must be > 0, got {self.lr:g}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule}")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must be >= 0, got {self.warmup_steps}")

    @property
    def shards(self) -> bool:
        """Whether it works on the sharded weights of trainer=fsdp."""
        return False

    def build(self, parameters: Iterable[nn.Parameter], num_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimizer of these weights, and its learning rate over a run of `num_steps`."""
        optimizer = self.make(list(parameters), num_steps)
        # the schedule counts steps, those that the fp16 scaler skips too
        warnings.filterwarnings("ignore", r"Detected call of .lr_scheduler\.step\(\). before", UserWarning)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, num_steps))

    def factor(self, step: int, num_steps: int) -> float:
        """Share of the full rate at a step of a run of `num_steps`."""
        return learning_rate_factor(step, self.schedule, self.warmup(num_steps), num_steps)

    @property
    def kind(self) -> str:
        """Whose state a checkpoint holds: what one kind of optimizer remembers is of no use to another."""
        return type(self).__name__

    def settings(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """What the config says of an optimizer that has just been built, as each of its groups holds it."""
        names = {field.name for field in fields(self)}  # type: ignore[arg-type]  # it is a dataclass
        names = (names | {"initial_lr"}) - _OTHERWISE
        return [{name: group[name] for name in names & group.keys()} for group in optimizer.param_groups]

    def take_up(self, optimizer: torch.optim.Optimizer, schedule: LambdaLR, settings: list[dict[str, Any]]) -> None:
        """Have an optimizer go by this config that was loaded from a checkpoint, where settings are part of the state.

        What it was doing under the same config stays the same, bit for bit.

        Args:
            settings: those of `settings`, from before it was loaded.
        """
        schedule.base_lrs = [own["initial_lr"] for own in settings]
        for group, own, factor in zip(optimizer.param_groups, settings, schedule.lr_lambdas, strict=True):
            group |= own
            group["lr"] = own["initial_lr"] * factor(schedule.last_epoch)

    def warmup(self, num_steps: int) -> int:
        """Over how many steps of a run of `num_steps` the rate rises."""
        return round(self.warmup_steps * num_steps) if self.warmup_steps < 1 else int(self.warmup_steps)

    @abstractmethod
    def make(self, parameters: list[nn.Parameter], num_steps: int) -> torch.optim.Optimizer:
        """The optimizer of these weights, without a schedule."""

    @abstractmethod
    def state_bytes(self, shape: Sequence[int]) -> int:
        """What it keeps of float32 weights of this shape, beside them and their gradient."""


@dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """AdamW (Loshchilov & Hutter 2019).

    Args:
        eight_bit: keep its moments in 8 bits (Dettmers et al. 2022); needs bitsandbytes.
        fused: update weights in one kernel, which is faster and rounds otherwise; None: where all are on a GPU. A run
            that goes on does what it did before.
    """

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    eps: float
    schedule: str
    warmup_steps: float
    eight_bit: bool
    fused: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eight_bit:
            if self.fused:
                raise ValueError("optimizer.fused=true is not for optimizer=adamw8bit, which is already; leave it out")
            _eight_bit_adamw()

    @property
    def shards(self) -> bool:
        return not self.eight_bit

    @property
    def kind(self) -> str:
        return "AdamW8bit" if self.eight_bit else "AdamW"

    def make(self, parameters: list[nn.Parameter], num_steps: int) -> torch.optim.Optimizer:
        first, second = self.betas  # a config gives a list
        options: dict[str, Any] = dict(lr=self.lr, betas=(first, second), weight_decay=self.weight_decay, eps=self.eps)
        if self.eight_bit:
            return _eight_bit_adamw()(parameters, **options)
        is_fused = all(parameter.is_cuda for parameter in parameters) if self.fused is None else self.fused
        optimizer = torch.optim.AdamW(parameters, **options, fused=is_fused or None)
        # it could divide fp16 gradients by their scale itself; but they are clipped before, which needs that done
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def state_bytes(self, shape: Sequence[int]) -> int:
        count = math.prod(shape)
        if not self.eight_bit or count < 4096:  # bitsandbytes keeps small ones whole
            return 2 * 4 * count
        blocks = math.ceil(count / 256)
        return 2 * (count + 4 * blocks)  # a scale a block


def _eight_bit_adamw() -> type[torch.optim.AdamW]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError(
            "optimizer=adamw8bit needs bitsandbytes: pip install bitsandbytes, or use optimizer=adamw"
        ) from None
    return AdamW8bit


@dataclass(frozen=True)
class Prodigy(OptimizerConfig):
    """Prodigy (Mishchenko & Defazio 2024), by its authors' package: AdamW that finds its own learning rate.

    Args:
        lr: multiplies the rate that is found.
        d0: the rate to begin with.
        d_coef: multiplies the estimate of the rate; what to tune, where anything.
        safeguard_warmup: leave the schedule's factor out of the estimate, for it would be too large after a warm-up.
    """

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    eps: float
    d0: float
    d_coef: float
    use_bias_correction: bool
    safeguard_warmup: bool
    schedule: str
    warmup_steps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.1 <= self.lr <= 10:
            raise ValueError(
                f"optimizer.lr of prodigy multiplies the rate that it finds, and {self.lr:g} is one of AdamW's; say "
                "optimizer.lr=1, and tune optimizer.d_coef"
            )

    def make(self, parameters: list[nn.Parameter], num_steps: int) -> torch.optim.Optimizer:
        from prodigyopt import Prodigy

        with contextlib.redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
            return Prodigy(
                parameters,
                lr=self.lr,
                betas=tuple(self.betas),
                weight_decay=self.weight_decay,
                eps=self.eps,
                d0=self.d0,
                d_coef=self.d_coef,
                use_bias_correction=self.use_bias_correction,
                safeguard_warmup=self.safeguard_warmup,
            )

    def state_bytes(self, shape: Sequence[int]) -> int:
        return 4 * 4 * math.prod(shape)  # two moments, the gradients' weighted sum, the weights it began with


@dataclass(frozen=True)
class Adafactor(OptimizerConfig):
    """Adafactor (Shazeer & Stern 2018) by transformers, at the rate that is said: of a matrix's second moment it keeps
    the sums over rows and columns alone, and no first moment.

    Args:
        eps: added to squared gradients; least root mean square of weights, where `scale_parameter`.
        clip_threshold: largest root mean square of an update before the rate.
        decay_rate: the second moment's memory at step t is 1 − t^decay_rate.
        scale_parameter: multiply the rate by the root mean square of the weights.
    """

    lr: float
    eps: tuple[float, float]
    clip_threshold: float
    decay_rate: float
    weight_decay: float
    scale_parameter: bool
    schedule: str
    warmup_steps: float

    def make(self, parameters: list[nn.Parameter], num_steps: int) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=self.lr,
            eps=tuple(self.eps),
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            weight_decay=self.weight_decay,
            scale_parameter=self.scale_parameter,
            relative_step=False,
            warmup_init=False,
        )

    def state_bytes(self, shape: Sequence[int]) -> int:
        if len(shape) < 2:
            return 4 * math.prod(shape)
        *outer, rows, columns = shape
        return 4 * math.prod(outer) * (rows + columns)


@dataclass(frozen=True)
class ScheduleFree(OptimizerConfig):
    """Schedule-free AdamW (Defazio et al. 2024), by its authors' package: an average of the weights takes the place of
    a falling rate. Its warm-up is its own, linear: the average weighs a step by its rate."""

    averages = True
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    eps: float
    schedule: str
    warmup_steps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule != "constant":
            raise ValueError(
                f"optimizer=schedule_free takes no optimizer.schedule, got {self.schedule}; say "
                "optimizer.schedule=constant"
            )

    def factor(self, step: int, num_steps: int) -> float:
        return 1.0

    def make(self, parameters: list[nn.Parameter], num_steps: int) -> torch.optim.Optimizer:
        from memtrain.training.schedule_free import ScheduleFreeAdamW

        first, second = self.betas
        return ScheduleFreeAdamW(
            parameters,
            lr=self.lr,
            betas=(first, second),
            weight_decay=self.weight_decay,
            eps=self.eps,
            warmup_steps=self.warmup(num_steps),
        )

    def state_bytes(self, shape: Sequence[int]) -> int:
        return 2 * 4 * math.prod(shape)
