"""`memtrain bench mitigation`: plan the runs of a protocol, run them, write the table."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from memtrain.cli.arguments import spelled
from memtrain.cli.checks import check_training
from memtrain.cli.sweep import stopped_by_signals
from memtrain.sweep.protocol import (
    JUDGE,
    Planned,
    Protocol,
    Record,
    Stage,
    Standing,
    check_words,
    is_trained,
    next_stage,
    plan,
)
from memtrain.sweep.space import quoted
from memtrain.training.exit_codes import EXIT_CODES

if TYPE_CHECKING:
    from memtrain.sweep.bench import Bench

log = logging.getLogger(__name__)

_SHOWN = 1.0  # s between two looks that are shown
_DECIDES = ("resolution", "crop", "caption", "where")  # what is encoded, of the keys of data
_PROGRAM = [sys.executable, "-m", "memtrain.cli.main"]


def bench_mitigation(cfg: DictConfig) -> None:
    _check_shards(cfg)
    protocol: Protocol = instantiate(cfg.protocol, _convert_="all")
    out, into = Path(cfg.out).expanduser(), None if cfg.into is None else Path(cfg.into).expanduser()
    raw = OmegaConf.to_container(cfg, resolve=False)["overrides"]  # ${…} in an override is for the run to resolve
    if into is not None:
        check_into(into, "mitigation")
    runs = plan(protocol, out, cfg.rows, cfg.seeds, raw)
    rows = list(dict.fromkeys(run.row for run in runs if run.row != JUDGE))
    seeds = max(run.seed for run in runs if run.row != JUDGE) + 1
    check_words(runs)
    if cfg.report:
        print(_write(out, runs, rows, seeds, into))
        return
    each = {run.row: run for run in runs}
    configs = _check_composed([each[row] for row in (*rows, JUDGE) if row in each])
    workers, cores, devices = _workers(cfg.workers)
    if cfg.dry_run:
        _print_plan(runs, protocol, workers)
        return
    _make_corpus(protocol)
    _encode_corpus(protocol)
    for config in configs:  # or each run would say so by itself
        check_training(config)
    from memtrain.sweep.bench import Bench, alone

    with alone(out):
        bench = Bench(runs, _PROGRAM, workers, cores, devices, changed=lambda: _write(out, runs, rows, seeds, into))
        with stopped_by_signals(bench, EXIT_CODES) as received:
            _watched(bench, protocol.minutes)
        print(_write(out, runs, rows, seeds, into))
    written = [name for name in ("table.md", "results.csv", "plane.png", "dose_curves.png") if (out / name).exists()]
    print(f"\n{out}: {', '.join(written)}")
    if received:
        log.warning("stopped; the same command goes on")
        sys.exit(EXIT_CODES[received[0]])
    if bench.failed:
        for name, said in bench.failed.items():
            print(f"{name}: {said}", file=sys.stderr)
        where = runs[0].folder.parent / "NAME"
        raise ValueError(f"{len(bench.failed)} of {len(runs)} runs failed; see trial.log in {where}")


def _check_shards(cfg: DictConfig) -> None:
    """Raises ValueError where a protocol wants the user's shards and has none, or is given some and has its own."""
    wants = "${shards}" in OmegaConf.to_yaml(cfg.protocol)
    if cfg.shards is None and wants:
        raise ValueError("the protocol has no corpus of its own; name yours with shards=FOLDER")
    if cfg.shards is not None and not wants:
        raise ValueError(
            f"shards={cfg.shards}: the protocol has a corpus of its own, {cfg.protocol.corpus}; say "
            "protocol.corpus=FOLDER protocol.make=[] to take another"
        )


def check_into(into: Path, name: str) -> None:
    """Raises ValueError where a text has no place for the table of this name."""
    from memtrain.report.table import marks_of

    text = into.read_text(encoding="utf-8") if into.is_file() else ""
    missing = [mark for mark in marks_of(name) if mark not in text]
    if missing:
        raise ValueError(f"into={into} has no line {missing[0]}, between which and its end the table is to stand")


def _check_composed(runs: Sequence[Planned]) -> list[DictConfig]:
    """The configs of these rows' trainings.

    Raises:
        ValueError: a row's words are wrong, or those of the evaluation.
    """
    commands = [(f"row {run.row}", "train", run.to_train()) for run in runs]
    commands.append(("protocol.evaluate", "evaluate", runs[0].evaluation))
    configs = []
    for what, command, words in commands:
        try:
            configs.append(compose(command, spelled(command, words)))
        except Exception as error:
            said = str(error).splitlines()[0]
            raise ValueError(f"{what}: {said}") from error
    for run, config in zip(runs, configs, strict=False):  # the last one is the evaluation's
        if run.row == JUDGE and not config.adapter.get("merge", True):
            raise ValueError(
                f"{JUDGE}: its training exports an adapter alone, which judges nothing; add adapter.merge=true to "
                "protocol.judge"
            )
    if runs[0].protocol.cache:
        _check_cached(runs, configs)
    return configs[:-1]


def _check_cached(runs: Sequence[Planned], configs: Sequence[DictConfig]) -> None:
    """Raises ValueError where a row would read of a cache what was encoded otherwise than it trains."""
    words = runs[0].protocol.cache
    try:
        encoded = compose("cache", spelled("cache", list(words))).data
    except Exception as error:
        raise ValueError(f"protocol.cache: {str(error).splitlines()[0]}") from error
    for run, config in zip(runs, configs, strict=False):  # the last one is the evaluation's
        for key in _DECIDES:
            if config.data.cache is not None and config.data[key] != encoded[key]:
                raise ValueError(
                    f"row {run.row} trains on data.{key}={config.data[key]}, protocol.cache={list(words)} encodes "
                    f"{encoded[key]}; add data.cache=null to the row"
                )


def _workers(asked: str | int) -> tuple[int, int, list[str]]:
    """Runs at a time, the cores that they share, and the ids of the GPUs."""
    from memtrain.sweep.trial import cores, devices

    gpus = devices()
    if asked == "auto":
        workers = len(gpus) or cores()
    elif isinstance(asked, int) and asked >= 1:
        workers = asked
    else:
        raise ValueError(f"workers must be >= 1 or auto, got {asked}")
    return workers, cores() if gpus else workers, gpus


def _print_plan(runs: Sequence[Planned], protocol: Protocol, workers: int) -> None:
    """Each row's command, what is there already, and how long the rest may take."""
    from memtrain.sweep.trial import spoken

    for run in runs:
        print(f"{run.name}: {next_stage(run).value}\n  memtrain train {shlex.join(run.to_train())}")
        if run.evaluation:
            print(f"  memtrain evaluate model={run.folder / 'export'} … {shlex.join(run.evaluation)}")
    left = [run for run in runs if next_stage(run) is not Stage.NOTHING]
    seconds = Standing(len(runs), len(left)).seconds_left(workers, protocol.minutes)
    print(f"{len(runs)} runs, {len(left)} of them to be made, {workers} at a time: about {spoken(seconds)}")


def _make_corpus(protocol: Protocol) -> None:
    """Make the corpus where it is not there and the protocol says how."""
    if not protocol.make or Path(protocol.corpus).exists():
        return
    _run(protocol.make, f"the corpus {protocol.corpus} could not be made")


def _encode_corpus(protocol: Protocol) -> None:
    """Encode what is not encoded yet, where the protocol says how."""
    if protocol.cache and Path(protocol.corpus).exists():  # else the check of the runs says what is missing
        words = ["cache", f"data.shards={quoted(protocol.corpus)}", *protocol.cache]
        _run(words, f"the corpus {protocol.corpus} could not be encoded; protocol.cache=[] leaves that to the runs")


def _run(words: Sequence[str], otherwise: str) -> None:
    """Run a command of memtrain. Raises ValueError where it fails."""
    log.info("memtrain %s", shlex.join(words))
    if subprocess.run([*_PROGRAM, *words]).returncode:
        raise ValueError(f"{otherwise}: memtrain {shlex.join(words)}")


def _watched(bench: Bench, minutes: float) -> None:
    """Run, and show what goes on: a live table on a terminal, else a line whenever a run is begun or over."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if not console.is_terminal:
        bench.run()
        return
    shown_at = 0.0

    def look() -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at > _SHOWN:
            shown_at = time.monotonic()
            live.update(_shown(bench, minutes), refresh=True)

    with Live(console=console, auto_refresh=False, transient=True) as live:
        bench.run(look)


def _shown(bench: Bench, minutes: float):
    """How far the table is: a line for all, and one for each run that is going on."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from memtrain.sweep.trial import spoken

    standing = bench.standing
    gone = sum(going.seconds for going in bench.going.values())
    left = spoken(standing.seconds_left(bench.workers, minutes, gone))
    done = standing.runs - standing.left - len(standing.failed)
    failed = f", {len(standing.failed)} failed" if standing.failed else ""
    lines = Table.grid(padding=(0, 2))
    for going in bench.going.values():
        lines.add_row(going.run.name, going.stage.value, f"step {going.step}", spoken(going.seconds))
    return Group(Text(f"{done} of {standing.runs} runs finished{failed}, about {left} left"), lines)


def _write(out: Path, runs: Sequence[Planned], rows: Sequence[str], seeds: int, into: Path | None) -> str:
    """Write the table of the runs that have ended, and put it into a text; the table."""
    from memtrain.core.files import written_aside
    from memtrain.report import mitigation
    from memtrain.report.table import marks_of, put_between_marks

    out.mkdir(parents=True, exist_ok=True)
    there = [run for run in runs if run.row in rows and is_trained(run.folder)]
    results = [mitigation.read_result(run.folder, run.row, run.seed) for run in there]
    curves = [row for row in runs[0].protocol.curves if row in rows]
    text = mitigation.write(out, results, rows, seeds, curves, _caption(runs))
    if into is not None:
        with written_aside(into) as aside:
            whole = put_between_marks(into.read_text(encoding="utf-8"), text, *marks_of("mitigation"))
            aside.write_text(whole, encoding="utf-8")
    return text


def _caption(runs: Sequence[Planned]) -> str:
    from memtrain.sweep.trial import spoken

    took = sum(Record.read(run).seconds for run in runs)
    return (
        f"{made_by()} Its runs took {spoken(took)}, one after the other. Figures are means ± standard deviations over "
        "seeds; the interval is a bootstrap over canaries, all seeds together. Copies are of a canary's own picture; "
        "beyond an attack's reach, nearer than it brings back never-trained pictures (but for one in a hundred)."
    )


def made_by() -> str:
    """What was typed, the commit of the program, and the date."""
    said = subprocess.run(
        ["git", "log", "-1", "--format=%h of %cs"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    from memtrain import __version__

    commit = f"commit {said.stdout.strip()}" if said.returncode == 0 else f"version {__version__}"
    typed = shlex.join(["memtrain", *sys.argv[1:]])
    return f"`{typed}`, {commit}, written on {date.today()}."
