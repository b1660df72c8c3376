"""`memtrain sweep`: read the study, search, print the Pareto front, draw it, compare the runs."""

from __future__ import annotations

import logging
import re
import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)

# Keys of the sweep's own; whatever else is said is for every trial.
_OWN = r"(\+|~)?(study|hydra)(/|\.|=|@)|(name|runs_dir|trials|workers|storage)="
_REPORTED = 20  # runs that the study's report compares; more make a page that nobody reads


def spelled(arguments: list[str]) -> list[str]:
    """`study=thresholds trials=6 exclusion=evidence` as Hydra takes it: what is for every trial in a list."""
    others = [argument for argument in arguments if re.match(r"~|[^-].*=", argument) and not re.match(_OWN, argument)]
    own = [argument for argument in arguments if argument not in others]
    return [f"overrides=[{','.join(map(_quoted, others))}]", *own] if others else own


def _quoted(text: str) -> str:
    """A string for Hydra's grammar, in which a backslash counts before a quote alone."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (r"\'" if found[2] else ""), text) + "'"


def sweep(cfg: DictConfig) -> None:
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("memtrain sweep needs Optuna; pip install 'memtrain[sweep]'") from error
    from rich.console import Console

    from memtrain.report import pareto
    from memtrain.sweep.plan import Plan
    from memtrain.sweep.pruning import MedianRule
    from memtrain.sweep.space import Parameter, merged
    from memtrain.sweep.study import Search

    for key in ("trials", "workers"):
        if cfg[key] < 1:
            raise ValueError(f"{key} must be >= 1, got {cfg[key]}")
    raw = OmegaConf.to_container(cfg, resolve=False)  # ${…} in an override is for the trial to resolve
    plan = Plan(
        name=cfg.name,
        runs_dir=Path(cfg.runs_dir),
        overrides=merged(raw["study"]["overrides"], raw["overrides"]),
        space=[Parameter(name=name, **parameter) for name, parameter in raw["study"]["space"].items()],
        memorization=cfg.study.memorization,
        quality=cfg.study.quality,
        startup_trials=cfg.study.startup_trials,
        seed=cfg.study.seed,
        tolerance=cfg.study.loss_tolerance,
    )
    prune = None if cfg.study.prune is None else MedianRule(**cfg.study.prune)
    search = Search(plan, cfg.storage, [sys.executable, "-m", "memtrain.cli.main", "train"], prune)
    stopped = False
    try:
        with _terminated_like_interrupted():
            search.run(cfg.trials, cfg.workers)
    except KeyboardInterrupt:
        stopped = True
    tried = search.tried()
    Console().print(pareto.table(tried, plan.tolerance))
    print(pareto.why(tried, plan.tolerance))
    if pareto.finished(tried):
        _write(plan, tried)
    if stopped:
        log.warning("stopped; the same command goes on")
        sys.exit(130)


@contextmanager
def _terminated_like_interrupted():
    """A scheduler's SIGTERM ends the sweep as a person's Ctrl-C does: trials are ended, their settings kept."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(plan, tried) -> None:
    """`pareto.png`, `trials.csv` and `report.html` in the study's folder."""
    from memtrain.report import pareto
    from memtrain.report.page import write_report
    from memtrain.sweep.space import merged

    folder, tolerance, chosen = plan.folder, plan.tolerance, pareto.choose(tried, plan.tolerance)
    print(f"{'run':10}memtrain train {shlex.join(merged(plan.overrides, shlex.split(chosen.setting)))}")
    pareto.write_csv(folder / "trials.csv", tried, tolerance)
    print(f"{'trials':10}{folder / 'trials.csv'}")
    pareto.draw_pareto(folder / "pareto.png", tried, tolerance, _axis(plan.memorization), _axis(plan.quality))
    print(f"{'front':10}{folder / 'pareto.png'}")
    best = [chosen, *pareto.front(tried), *pareto.finished(tried)]
    here = [name for name in dict.fromkeys(one.name for one in best) if (folder / name / "config.yaml").exists()]
    shown = sorted(here[:_REPORTED])
    if shown:
        write_report([folder / name for name in shown], folder / "report.html")
        left = len(pareto.finished(tried)) - len(shown)
        said = f"   without {left} of the finished trials: {_REPORTED} at most, of this machine" if left else ""
        print(f"{'report':10}{folder / 'report.html'}{said}")


def _axis(column: str) -> str:
    """A column of metrics.csv in words."""
    words = {"copy_rate/canary": "copies of canaries, share of generations", "heldout_loss": "held-out loss"}
    return words.get(column, column)
