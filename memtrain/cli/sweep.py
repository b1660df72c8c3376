"""`memtrain sweep`: read the study, search, print the Pareto front, draw it, compare the runs."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from memtrain.sweep.space import Parameter, merged

if TYPE_CHECKING:
    from memtrain.sweep.study import Search

log = logging.getLogger(__name__)

_REPORTED = 20  # runs that the study's report compares; more make a page that nobody reads


def sweep(cfg: DictConfig) -> None:
    for key in ("trials", "workers"):
        if cfg[key] < 1:
            raise ValueError(f"{key} must be >= 1, got {cfg[key]}")
    if cfg.patience is not None and not cfg.patience > 0:
        raise ValueError(f"patience must be > 0 minutes, or null, got {cfg.patience:g}")
    from rich.console import Console

    from memtrain.report import pareto
    from memtrain.sweep.plan import Plan
    from memtrain.sweep.pruning import MedianRule
    from memtrain.sweep.standing import tried
    from memtrain.sweep.study import Search
    from memtrain.training.exit_codes import EXIT_CODES

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
    patience = None if cfg.patience is None else 60 * cfg.patience
    search = Search(plan, cfg.storage, [sys.executable, "-m", "memtrain.cli.main", "train"], prune, patience)
    with stopped_by_signals(search, EXIT_CODES) as received:
        search.run(cfg.trials, cfg.workers)
    runs = tried(search.study)
    Console().print(pareto.table(runs, plan.tolerance))
    print(pareto.why(runs, plan.tolerance))
    if pareto.finished(runs):
        _write(plan, runs)
    if received:
        log.warning("stopped; the same command goes on")
        sys.exit(EXIT_CODES[received[0]])


@contextmanager
def stopped_by_signals(search: Search, exit_codes: Mapping[int, int]) -> Iterator[list[int]]:
    """One of `exit_codes` stops the search, a second one ends it at once. What was received."""
    received: list[int] = []

    def stop(number, frame):
        received.append(number)
        if len(received) > 1:  # trials end without us, and are taken back by the same command
            sys.exit(exit_codes[number])
        search.stopped = True
        log.warning("stopping; trials that are going on write a checkpoint. Again to leave at once")

    before = {number: signal.signal(number, stop) for number in exit_codes}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(plan, tried) -> None:
    """`pareto.png`, `trials.csv` and `report.html` in the study's folder."""
    from memtrain.report import pareto
    from memtrain.report.page import write_report

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
