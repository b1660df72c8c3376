"""How a study stands, read from Optuna's storage.

A run that is cut off and goes on is several trials of Optuna's, one after the other, with the run's folder in common.
"""

from __future__ import annotations

import shlex
from statistics import median

from optuna import Study, Trial
from optuna.trial import FrozenTrial, TrialState

from memtrain.report.pareto import Tried, choose
from memtrain.sweep.pruning import Curve, Objectives
from memtrain.sweep.trial import spoken

SETTLED = (TrialState.COMPLETE, TrialState.PRUNED)
_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "given up",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "going on",
    TrialState.WAITING: "waiting",
}


def number_of_run(study: Study, trial: Trial | FrozenTrial) -> int:
    """The number of a trial's run among the study's: a trial of Optuna's that goes on with a run is no other run."""
    earlier = study.get_trials(deepcopy=False)[: trial.number]
    return trial.number - sum("resume" in one.user_attrs for one in earlier)


def run_of(study: Study, trial: Trial | FrozenTrial) -> str:
    """The name of a trial's run, which is that of its folder."""
    return trial.user_attrs.get("run") or f"trial_{number_of_run(study, trial):03d}"


def curve_of(trial: FrozenTrial) -> Curve:
    """What a trial measured so far, from the storage."""
    return {int(step): Objectives(*found) for step, *found in trial.user_attrs.get("curve", [])}


def tried(study: Study) -> list[Tried]:
    """All runs so far, in order; of one that was cut off, what became of it."""
    found: dict[str, Tried] = {}
    for trial in study.get_trials(deepcopy=False):
        name = run_of(study, trial)
        values = trial.values if trial.state is TrialState.COMPLETE else (None, None)
        setting = shlex.join(trial.user_attrs.get("overrides", []))
        found[name] = Tried(name, setting, _STATES[trial.state], max(curve_of(trial), default=0), *values)
    return list(found.values())


def standing(study: Study, trials: int, workers: int, tolerance: float) -> str:
    """How far a study is on its way to `trials`, how long it may take, and which it would take so far; one line."""
    settled = study.get_trials(deepcopy=False, states=SETTLED)
    said = f"{len(settled)} of {trials} trials done"
    seconds = [one.user_attrs["seconds"] for one in settled if "seconds" in one.user_attrs]
    left = trials - len(settled)
    if seconds and left > 0:
        going = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))  # other machines' too
        said += f", about {spoken(median(seconds) * left / min(left, max(workers, going)))} left"
    best = choose(tried(study), tolerance)
    return f"{said}; best so far {best.name}: {best.setting}" if best else said
