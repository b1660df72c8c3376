"""Types of the keys of sweep. Values are in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class SweepParameter:
    key: str = MISSING
    choices: list[Any] | None = None
    low: Any = None  # a whole number or another
    high: Any = None
    log: bool = False
    when: str | None = None


@dataclass
class Prune:
    min_trials: int = MISSING
    min_step: int = MISSING


@dataclass
class Study:
    overrides: list[str] = MISSING
    space: dict[str, SweepParameter] = field(default_factory=dict)
    memorization: str = MISSING
    quality: str = MISSING
    loss_tolerance: float = MISSING
    startup_trials: int = MISSING
    seed: int = MISSING
    prune: Prune | None = field(default_factory=Prune)


@dataclass
class Sweep:
    name: str = MISSING
    runs_dir: str = MISSING
    trials: int = MISSING
    workers: int = MISSING
    patience: float | None = MISSING
    storage: str | None = MISSING
    overrides: list[str] = MISSING
    study: Any = MISSING
