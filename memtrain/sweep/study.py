"""The search: Optuna says what to try, each trial is a run, and what has ended is told to Optuna.

Everything is in Optuna's storage, so that a sweep goes on where it was stopped or killed, and the same command on
several machines with one storage works on one study.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from memtrain.report.pareto import Tried
from memtrain.sweep.pruning import Curve, MedianRule, Objectives
from memtrain.sweep.space import Parameter, check_space, key_of, merged, suggest
from memtrain.sweep.trial import Process, cores, devices, environment_of, read_curve

log = logging.getLogger(__name__)

_LOOK = 0.5  # s between two looks at the trials that are going on
_SIGN_OF_LIFE = 30.0  # s between two signs of life in the storage
_GONE = 300.0  # s without one, after which a trial of another machine is taken for dead
_MAX_FAILED = 3  # trials in a row
_REFUSED = 2  # exit code of `memtrain train` for what the user can mend
_TAKEN = "%s: another sweep saw no sign of life of it, and tries its settings again"
_SETTLED = (TrialState.COMPLETE, TrialState.PRUNED)
_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "given up",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "going on",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Plan:
    """What a study is; it does not change while it is going on.

    Args:
        name: of the study; trials are the runs `<runs_dir>/<name>/trial_000` and so on.
        overrides: of every trial.
        space: what differs between trials; a parameter whose key is in `overrides` does not.
        memorization, quality: columns of metrics.csv, both to be small.
        startup_trials: drawn at random before what was found guides the search.
        seed: of the search. What a trial is given depends on it, on its number and on what was found before.
    """

    name: str
    runs_dir: Path
    overrides: list[str]
    space: list[Parameter]
    memorization: str
    quality: str
    startup_trials: int
    seed: int

    def __post_init__(self):
        check_space(self.space)
        for override in self.overrides:
            if key_of(override) in ("run_id", "run_dir", "name", "runs_dir"):
                raise ValueError(f"{override}: the sweep names its runs itself; name=… runs_dir=… name the study")

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


class Search:
    """A study that is going on.

    Args:
        storage: an Optuna URL; None for SQLite in the study's folder.
        command: the training program, to which overrides are appended.
        prune: when a trial is given up; None: never.

    Raises:
        ValueError: the storage cannot be used, or holds a study of that name that was made otherwise.
    """

    def __init__(self, plan: Plan, storage: str | None, command: Sequence[str], prune: MedianRule | None):
        self.plan, self.command, self.prune = plan, list(command), prune
        self.host, self.pid = socket.gethostname(), os.getpid()
        plan.folder.mkdir(parents=True, exist_ok=True)
        self.study = _open(plan, storage or f"sqlite:///{plan.folder / 'study.db'}")
        self.going: dict[int, tuple[optuna.Trial, Process]] = {}  # by worker
        self.seen: dict[int, float] = {}  # number of a trial of ours -> time of its last sign of life
        self.failed_in_a_row = 0

    def run(self, trials: int, workers: int) -> None:
        """Until `trials` have finished or were given up, earlier starts and other machines included.

        Raises:
            ValueError: the training program refuses its config, or fails again and again.
        """
        gpus = devices()
        looked = -math.inf
        try:
            while True:
                if time.monotonic() - looked > _SIGN_OF_LIFE:
                    looked = time.monotonic()
                    self._take_back_the_dead()
                for slot in range(workers):
                    if slot not in self.going and self._wants_more(trials):
                        environment = environment_of(slot, workers, cores(), gpus)
                        self.going[slot] = self._start(environment)
                if not self.going:
                    return
                time.sleep(_LOOK)
                for slot, (trial, process) in list(self.going.items()):
                    try:
                        ended = self._attend(trial, process)
                    except ValueError:  # it has been told as failed, so it is not to be tried again
                        del self.going[slot]
                        process.wait()
                        raise
                    if ended:
                        del self.going[slot]
                        process.wait()
        finally:
            self._stop()

    def _wants_more(self, trials: int) -> bool:
        counted = (*_SETTLED, TrialState.RUNNING)
        return len(self.study.get_trials(deepcopy=False, states=counted)) < trials

    def _start(self, environment: dict[str, str]) -> tuple[optuna.Trial, Process]:
        plan = self.plan
        trial = self.study.ask()
        trial.set_user_attr("owner", [self.host, self.pid])
        self._sign_of_life(trial)
        # a sampler for each trial: seeded with its number it draws nothing twice, here or on another machine
        seed = int(np.random.SeedSequence([plan.seed, trial.number]).generate_state(1)[0])
        self.study.sampler = TPESampler(n_startup_trials=plan.startup_trials, multivariate=False, seed=seed)
        own = suggest(trial, plan.space, plan.fixed)
        folder = plan.folder / f"trial_{trial.number:03d}"
        trial.set_user_attr("overrides", own)
        log.info("%s: %s", folder.name, " ".join(own))
        names = [f"name={_quoted(plan.name)}", f"run_id={folder.name}", f"runs_dir={_quoted(str(plan.runs_dir))}"]
        command = [*self.command, *merged(plan.overrides, own), *names]
        return trial, Process(command, folder, environment)

    def _attend(self, trial: optuna.Trial, process: Process) -> bool:
        """Look at a trial that is going on. True where it has ended."""
        code = process.exit_code
        try:
            curve = self._note_curve(trial, process)
            self._sign_of_life(trial)
        except UpdateFinishedTrialError:
            log.warning(_TAKEN, process.folder.name)
            return True
        if code is None:
            step = self.prune and self.prune.gives_up_at(curve, self._other_curves(trial.number))
            if step is None:
                return False
            log.info("%s: given up at step %d, %s", process.folder.name, step, self._said(curve[step]))
            self._tell(trial.number, TrialState.PRUNED)
            return True
        if code == _REFUSED:
            self._tell(trial.number, TrialState.FAIL)
            raise ValueError(f"{process.folder.name}: {process.last_words()}")
        problem = f"exit code {code}: {process.last_words()}" if code else self._missing(curve)
        if problem:
            self._tell(trial.number, TrialState.FAIL)
            log.warning("%s: failed, %s", process.folder.name, problem)
            self.failed_in_a_row += 1
            if self.failed_in_a_row == _MAX_FAILED:
                raise ValueError(
                    f"{_MAX_FAILED} trials in a row failed, the last with {problem}; see {process.folder}"
                )
            return True
        self.failed_in_a_row = 0
        found = curve[max(curve)]
        log.info("%s: %s", process.folder.name, self._said(found))
        self._tell(trial.number, TrialState.COMPLETE, list(found))
        return True

    def _said(self, found: Objectives) -> str:
        return f"{self.plan.memorization} {found.memorization:.3f}, {self.plan.quality} {found.quality:.4f}"

    def _missing(self, curve: Curve) -> str | None:
        if not curve:
            return (
                f"no {self.plan.memorization} with {self.plan.quality} in its metrics.csv; they need logger=csv, "
                "callbacks.copies, callbacks.validation, canaries.count and reference.count"
            )
        found = curve[max(curve)]
        return None if all(map(math.isfinite, found)) else f"it came to {self._said(found)}"

    def _note_curve(self, trial: optuna.Trial, process: Process) -> Curve:
        """The trial's curve so far; what is new of it goes to the storage, for the trials of other machines."""
        curve = read_curve(process.folder, self.plan.memorization, self.plan.quality)
        points = [[step, *found] for step, found in curve.items()]
        if points and points != trial.user_attrs.get("curve"):
            trial.set_user_attr("curve", points)
        return curve

    def _other_curves(self, number: int) -> list[Curve]:
        settled = self.study.get_trials(deepcopy=False, states=_SETTLED)
        return [_curve_of(other) for other in settled if other.number != number]

    def _sign_of_life(self, trial: optuna.Trial) -> None:
        if time.monotonic() - self.seen.get(trial.number, -math.inf) > _SIGN_OF_LIFE:
            self.seen[trial.number] = time.monotonic()
            trial.set_user_attr("seen", time.time())

    def _tell(self, number: int, state: TrialState, values: list[float] | None = None) -> bool:
        """False where another machine has ended the trial, because it saw no sign of life."""
        try:
            self.study.tell(number, values, state)
        except (ValueError, UpdateFinishedTrialError):  # Optuna's for a trial that is not going on
            log.warning(_TAKEN, f"trial_{number:03d}")
            return False
        return True

    def _take_back_the_dead(self) -> None:
        """Trials whose sweep is gone have failed; their settings are tried again."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number not in self.seen and self._is_dead(trial):
                log.info("trial_%03d was cut off; its settings are tried again", trial.number)
                self._again(trial.number, trial.params)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        host, pid = trial.user_attrs.get("owner", [None, 0])
        if host == self.host and (pid == self.pid or not _is_alive(pid)):
            return True
        began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return time.time() - trial.user_attrs.get("seen", began) > _GONE

    def _again(self, number: int, params: dict[str, Any]) -> None:
        if self._tell(number, TrialState.FAIL) and params:
            self.study.enqueue_trial(params)

    def _stop(self) -> None:
        """End what is going on, all of it at once; its settings are tried again by whoever goes on."""
        for _, process in self.going.values():
            process.let_go()
        for trial, process in self.going.values():
            process.wait()
            self._again(trial.number, trial.params)
        self.going.clear()

    def tried(self) -> list[Tried]:
        """All trials of the study so far, in order."""
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state is TrialState.WAITING:
                continue
            values = trial.values if trial.state is TrialState.COMPLETE else (None, None)
            setting = " ".join(trial.user_attrs.get("overrides", []))
            steps = _curve_of(trial)
            found.append(
                Tried(f"trial_{trial.number:03d}", setting, _STATES[trial.state], max(steps, default=0), *values)
            )
        return found


def _open(plan: Plan, storage: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=plan.name,
            directions=["minimize", "minimize"],
            sampler=TPESampler(multivariate=False),
            load_if_exists=True,
        )
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise ValueError(f"storage cannot be used: {str(error).splitlines()[0]}") from error
    facts, before = plan.facts(), study.user_attrs.get("plan")
    if before is None:
        study.set_user_attr("plan", facts)
    elif before != facts:
        changed = _differences(before, facts)
        raise ValueError(
            f"the study {plan.name} was made otherwise: {'; '.join(changed)}; name=… begins a new one"
        )
    return study


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
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
    if fact is None:
        return "not there"
    if isinstance(fact, dict):
        return " ".join(f"{key}={value}" for key, value in fact.items() if value is not None and key != "name")
    return str(fact)


def _curve_of(trial: FrozenTrial) -> Curve:
    return {int(step): Objectives(*found) for step, *found in trial.user_attrs.get("curve", [])}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _quoted(value: str) -> str:
    """For Hydra: names of folders may hold spaces, commas, brackets."""
    return "'" + value.replace("'", r"\'") + "'"
