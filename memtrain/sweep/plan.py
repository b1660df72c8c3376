"""What a study is, and its place in Optuna's storage."""

from __future__ import annotations

import fcntl
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from memtrain.sweep.space import Parameter, check_space, key_of

# what the sweep says itself to each of its runs
_OWN = ("run_id", "run_dir", "name", "runs_dir", "resume", "resume.run", "resume.allow")


@dataclass(frozen=True)
class Plan:
    """The settings of a study, which do not change while it is going on.

    Args:
        name: of the study; trials are the runs `<runs_dir>/<name>/trial_000` and so on.
        overrides: of every trial.
        space: what differs between trials; a parameter whose key is in `overrides` does not.
        memorization, quality: columns of metrics.csv, both to be small.
        startup_trials: drawn at random before what was found guides the search.
        seed: of the search. What a trial is given depends on it, on its number and on what was found before.
        tolerance: of the choice, a share of the best quality.
    """

    name: str
    runs_dir: Path
    overrides: list[str]
    space: list[Parameter]
    memorization: str
    quality: str
    startup_trials: int
    seed: int
    tolerance: float

    def __post_init__(self):
        check_space(self.space)
        if not self.tolerance >= 0:
            raise ValueError(f"study.loss_tolerance must be >= 0, got {self.tolerance:g}")
        for override in self.overrides:
            if key_of(override) in _OWN:
                raise ValueError(
                    f"{override}: a sweep names its runs itself and goes on by itself; name=… runs_dir=… name the study"
                )

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name

    @property
    def fixed(self) -> dict[str, str]:
        """key -> value of what every trial is given."""
        return {key_of(override): override.partition("=")[2] for override in self.overrides}

    def facts(self) -> dict[str, Any]:
        """What trials need to have in common to be compared."""
        space = {parameter.name: asdict(parameter) for parameter in self.space if parameter.key not in self.fixed}
        return {"overrides": self.fixed, "space": space, "objectives": [self.memorization, self.quality]}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold off other sweeps in the folder: SQLite lets two make its tables, or take one trial, at once."""
        with (self.folder / "study.lock").open("a") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def open_study(plan: Plan, storage: str | None) -> optuna.Study:
    """The study, new where the storage has none of its name.

    Args:
        storage: an Optuna URL; None for SQLite in the study's folder, which is made.

    Raises:
        ValueError: the storage cannot be used, or holds a study of that name that was made otherwise.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plan.folder.mkdir(parents=True, exist_ok=True)
    storage = storage or f"sqlite:///{plan.folder / 'study.db'}"
    with plan.alone():
        try:
            study = _opened(plan.name, storage)
        except (SQLAlchemyError, OptunaError, ImportError, ValueError, RuntimeError) as error:
            raise ValueError(f"storage cannot be used: {str(error.__cause__ or error).splitlines()[0]}") from error
        facts, before = plan.facts(), study.user_attrs.get("plan")
        if before not in (None, facts) and not any(map(_measured, study.get_trials())):
            optuna.delete_study(study_name=plan.name, storage=storage)  # a mistyped command is not remembered
            study, before = _opened(plan.name, storage), None
        if before is None:
            study.set_user_attr("plan", facts)
        elif before != facts:
            changed = _differences(before, facts)
            raise ValueError(f"the study {plan.name} was made otherwise: {'; '.join(changed)}; name=… begins a new one")
    return study


def _opened(name: str, storage: str) -> optuna.Study:
    """Open a study, in several tries: where machines begin one at once, one makes the tables, and others fail."""
    for last in (False, False, True):
        try:
            return optuna.create_study(
                storage=storage,
                study_name=name,
                directions=["minimize", "minimize"],
                sampler=TPESampler(multivariate=False),
                load_if_exists=True,
            )
        except DBAPIError:
            if last:
                raise
            time.sleep(random.uniform(0.5, 1.5))


def _measured(trial: FrozenTrial) -> bool:
    """Whether something is known of a trial, or will be."""
    return trial.state is not TrialState.FAIL or "curve" in trial.user_attrs


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the facts of two plans, a line a key."""
    lines = []
    for kind in ("overrides", "space"):
        for key in {**before[kind], **now[kind]}:
            old, new = before[kind].get(key), now[kind].get(key)
            if old != new:
                lines.append(f"{key} was {_told(old)}, is {_told(new)}")
    if before["objectives"] != now["objectives"]:
        lines.append(f"objectives were {before['objectives']}, are {now['objectives']}")
    return lines


def _told(fact: Any) -> str:
    """A value or a parameter of the space, in words."""
    if fact is None:
        return "not there"
    if isinstance(fact, dict):
        return " ".join(f"{key}={value}" for key, value in fact.items() if value is not None and key != "name")
    return str(fact)
