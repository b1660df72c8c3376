"""The search: Optuna says what to try, each trial is a run, and what has ended is told to Optuna.

Everything is in Optuna's storage, so that a sweep goes on where it was stopped or killed, and the same command on
several machines with one storage works on one study.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from memtrain.sweep.plan import Plan, open_study
from memtrain.sweep.pruning import Curve, MedianRule, Objectives
from memtrain.sweep.space import merged, quoted, suggest
from memtrain.sweep.standing import SETTLED, curve_of, number_of_run, run_of, standing
from memtrain.sweep.trial import Process, cores, devices, environment_of, read_curve, spoken

log = logging.getLogger(__name__)
Trial = optuna.Trial | FrozenTrial

_LOOK = 0.5  # s between two looks at the trials that are going on
_SIGN_OF_LIFE = 30.0  # s between two signs of life in the storage
_GONE = 300.0  # s without one, after which a trial of another machine is taken for dead
_LOST = 10.0  # s between two attempts to reach a storage that was lost
_MAX_FAILED = 3  # trials in a row
_REFUSED = 2  # exit code of `memtrain train` for what the user can mend
_STOPPED = (75, 130, 143)  # its exit codes where somebody told it to end: it wrote a checkpoint
_TAKEN = "%s: another sweep saw no sign of life of it, and goes on with it"


@dataclass(frozen=True)
class Going:
    """A trial that is going on.

    Args:
        resumes: from the last checkpoint in its run's folder.
        before: seconds that the run took before it was cut off.
    """

    trial: optuna.Trial
    process: Process
    resumes: bool
    before: float

    @property
    def name(self) -> str:
        return self.process.folder.name

    @property
    def seconds(self) -> float:
        return self.before + self.process.seconds


class Search:
    """A study that is going on.

    Args:
        storage: an Optuna URL; None for SQLite in the study's folder.
        command: the training program, to which overrides are appended.
        prune: when a trial is given up; None: never.
        patience: seconds without anything new in a trial's folder, after which it is ended, and goes on from its
            checkpoint; None: any time.

    Raises:
        ValueError: the storage cannot be used, or holds a study of that name that was made otherwise.
    """

    def __init__(
        self,
        plan: Plan,
        storage: str | None,
        command: Sequence[str],
        prune: MedianRule | None,
        patience: float | None = None,
    ):
        self.plan, self.command, self.prune, self.patience = plan, list(command), prune, patience
        self.host, self.pid = socket.gethostname(), os.getpid()
        self.study = open_study(plan, storage)
        self.going: dict[int, Going] = {}  # by worker
        self.seen: dict[int, float] = {}  # number of a trial of ours -> time of its last sign of life
        self.failed_in_a_row = 0
        self.looked = -math.inf  # for trials whose sweep is gone, last
        self.gpus = devices()
        self.stopped = False  # set by whoever wants `run` to return

    def run(self, trials: int, workers: int) -> None:
        """Run trials until so many have finished or were given up, earlier starts and other machines included.

        What goes on when it is stopped is ended, with a checkpoint, and left to be gone on with.

        Raises:
            ValueError: the training program refuses its config, measures neither objective, or fails again and again;
                or the storage cannot be reached for as long as makes other machines take our trials for dead.
        """
        log.info("%s: %s. What a trial prints is in its trial.log", self.plan.folder, self._standing(trials, workers))
        reached = time.monotonic()
        try:
            while not self.stopped:
                try:
                    if not self._round(trials, workers):
                        return
                    reached = time.monotonic()
                    time.sleep(_LOOK)
                except (SQLAlchemyError, OptunaError) as error:
                    said = str(error.__cause__ or error).splitlines()[0]
                    if time.monotonic() - reached > _GONE:
                        raise ValueError(f"the storage is gone: {said}; the same command goes on") from error
                    log.warning("the storage cannot be reached, trials go on meanwhile: %s", said)
                    time.sleep(_LOST)
        finally:
            self._stop()

    def _round(self, trials: int, workers: int) -> bool:
        """Look after what goes on, and start what there is room for. False where nothing goes on any more."""
        for slot, going in list(self.going.items()):
            try:
                ended = self._attend(going)
            except ValueError:  # it has been told as failed, so it is not to be tried again
                del self.going[slot]
                going.process.wait()
                raise
            if ended:
                del self.going[slot]
                going.process.wait()
                log.info(self._standing(trials, workers))
        with self.plan.alone():
            if time.monotonic() - self.looked > _SIGN_OF_LIFE:
                self._take_back_the_dead()
                self.looked = time.monotonic()
            for slot in range(workers):
                if slot not in self.going and self._wants_more(trials):
                    self.going[slot] = self._start(environment_of(slot, workers, cores(), self.gpus))
        return bool(self.going)

    def _standing(self, trials: int, workers: int) -> str:
        return standing(self.study, trials, workers, self.plan.tolerance)

    def _wants_more(self, trials: int) -> bool:
        counted = (*SETTLED, TrialState.RUNNING)
        return len(self.study.get_trials(deepcopy=False, states=counted)) < trials

    def _start(self, environment: dict[str, str]) -> Going:
        """Ask the study for a trial, and start its run, or go on with it where it was cut off."""
        plan = self.plan
        trial = self.study.ask()
        trial.set_user_attr("owner", [self.host, self.pid])
        number = number_of_run(self.study, trial)
        # a sampler for each trial: seeded with its number it draws nothing twice, here or on another machine
        seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
        self.study.sampler = TPESampler(n_startup_trials=plan.startup_trials, multivariate=False, seed=seed)
        own = suggest(trial, plan.space, plan.fixed)
        folder = plan.folder / run_of(self.study, trial)
        trial.set_user_attr("run", folder.name)
        trial.set_user_attr("overrides", own)
        names = [f"name={quoted(plan.name)}", f"run_id={folder.name}", f"runs_dir={quoted(str(plan.runs_dir))}"]
        told = trial.user_attrs
        resumes = told.get("resume", False) and (folder / "config.yaml").exists()
        if resumes:
            names.append(f"resume={quoted(str(folder))}")
        log.info("%s%s: %s", folder.name, " goes on" if resumes else "", shlex.join(own))
        command = [*self.command, *merged(plan.overrides, own), *names]
        going = Going(trial, Process(command, folder, environment), resumes, told.get("seconds", 0.0))
        self._sign_of_life(going)
        return going

    def _attend(self, going: Going) -> bool:
        """Look at a trial that is going on. True where it has ended."""
        trial, process = going.trial, going.process
        code = process.exit_code
        try:
            curve = self._note_curve(trial, process)
            self._sign_of_life(going, at_once=code is not None)
        except UpdateFinishedTrialError:
            log.warning(_TAKEN, going.name)
            return True
        if code is None:
            return self._is_given_up(going, curve) or self._hangs(going)
        if code == _REFUSED:
            self._refused(going)
            return True
        if code:
            self._failed(going, f"exit code {code}: {process.last_words()}", goes_on=code in _STOPPED)
            return True
        if not curve:
            self._tell(trial, TrialState.FAIL)
            raise ValueError(
                f"{going.name}: no {self.plan.memorization} with {self.plan.quality} in its metrics.csv; they need "
                "logger=csv, callbacks.copies, callbacks.validation, canaries.count and reference.count"
            )
        found = curve[max(curve)]
        if not all(map(math.isfinite, found)):
            self._failed(going, f"it came to {self._said(found)}", goes_on=False)
            return True
        self.failed_in_a_row = 0
        log.info("%s: %s, in %s", going.name, self._said(found), spoken(going.seconds))
        self._tell(trial, TrialState.COMPLETE, list(found))
        return True

    def _is_given_up(self, going: Going, curve: Curve) -> bool:
        """Give a trial up where the rule says so. True where it has."""
        step = self.prune and self.prune.gives_up_at(curve, self._other_curves(going.trial.number))
        if step is None:
            return False
        log.info("%s: given up at step %d, %s", going.name, step, self._said(curve[step]))
        self._tell(going.trial, TrialState.PRUNED)
        return True

    def _hangs(self, going: Going) -> bool:
        """Take a trial for failed where nothing new came for too long. True where it has."""
        silent = going.process.silent_for
        if self.patience is None or silent < self.patience:
            return False
        self._failed(going, f"nothing new in its folder for {spoken(silent)}", goes_on=True)
        return True

    def _refused(self, going: Going) -> None:
        """Take a refusal of the training program so that nothing is lost: its run begins anew, or waits to be mended.

        Raises:
            ValueError: it began anew, or for the first time, so the checkpoint is not what is wrong.
        """
        said = going.process.last_words()
        if going.resumes:
            log.warning("%s cannot go on, so it begins anew: %s", going.name, said)
            self._again(going.trial, resume=False)
            return
        if "resume" in going.trial.user_attrs:
            self._again(going.trial)
        else:
            self._tell(going.trial, TrialState.FAIL)
        raise ValueError(f"{going.name}: {said}")

    def _failed(self, going: Going, problem: str, goes_on: bool) -> None:
        """Count a failed trial, and leave it to be gone on with. Raises ValueError where too many fail in a row."""
        log.warning("%s: failed, %s", going.name, problem)
        if goes_on:
            self._again(going.trial)
        else:
            self._tell(going.trial, TrialState.FAIL)
        self.failed_in_a_row += 1
        if self.failed_in_a_row == _MAX_FAILED:
            raise ValueError(
                f"{_MAX_FAILED} trials in a row failed, the last with {problem}; see {going.process.folder}"
            )

    def _said(self, found: Objectives) -> str:
        return f"{self.plan.memorization} {found.memorization:.3f}, {self.plan.quality} {found.quality:.4f}"

    def _note_curve(self, trial: optuna.Trial, process: Process) -> Curve:
        """The trial's curve so far; what is new of it goes to the storage, for the trials of other machines."""
        curve = read_curve(process.folder, self.plan.memorization, self.plan.quality)
        points = [[step, *found] for step, found in curve.items()]
        if points and points != trial.user_attrs.get("curve"):
            trial.set_user_attr("curve", points)
        return curve

    def _other_curves(self, number: int) -> list[Curve]:
        settled = self.study.get_trials(deepcopy=False, states=SETTLED)
        return [curve_of(other) for other in settled if other.number != number]

    def _sign_of_life(self, going: Going, at_once: bool = False) -> None:
        """Note in the storage, every now and then, that a trial is going on."""
        trial = going.trial
        if at_once or time.monotonic() - self.seen.get(trial.number, -math.inf) > _SIGN_OF_LIFE:
            self.seen[trial.number] = time.monotonic()
            trial.set_user_attr("seen", time.time())
            trial.set_user_attr("seconds", going.seconds)

    def _tell(self, trial: Trial, state: TrialState, values: list[float] | None = None) -> bool:
        """Tell the study what became of a trial. False where another machine has ended it, seeing no sign of life."""
        try:
            self.study.tell(trial.number, values, state)
        except (ValueError, UpdateFinishedTrialError):  # Optuna's for a trial that is not going on
            log.warning(_TAKEN, run_of(self.study, trial))
            return False
        return True

    def _take_back_the_dead(self) -> None:
        """Take trials whose sweep is gone for failed, and leave their runs to be gone on with."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number not in self.seen and self._is_dead(trial):
                log.info("%s was cut off", run_of(self.study, trial))
                self._again(trial)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the sweep of a trial that is said to be running is gone."""
        host, pid = trial.user_attrs.get("owner", [None, 0])
        if host == self.host and (pid == self.pid or not _is_alive(pid)):
            return True
        began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return time.time() - trial.user_attrs.get("seen", began) > _GONE

    def _again(self, trial: Trial, resume: bool = True) -> None:
        """Leave the trial's run to be started again, with its settings and in its folder, before any new one.

        Args:
            resume: from its last checkpoint; else anew.
        """
        if self._tell(trial, TrialState.FAIL):
            told = trial.user_attrs
            kept = {name: told[name] for name in ("overrides", "curve", "seconds") if name in told}
            user_attrs = {"run": run_of(self.study, trial), "resume": resume, **kept}
            self.study.enqueue_trial(trial.params, user_attrs=user_attrs)

    def _stop(self) -> None:
        """End what is going on, all of it at once; whoever goes on with the study goes on with it."""
        for going in self.going.values():
            going.process.let_go()
        for going in self.going.values():
            going.process.wait()
            with suppress(SQLAlchemyError, OptunaError):  # then it is taken back when the storage is there again
                self._again(going.trial)
        self.going.clear()


def _is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
