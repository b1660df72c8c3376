"""Prompts that are to be scored, shared by processes or machines, in parts or all at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from memtrain.audit.detect.parts import Parts
from memtrain.data.distribute import Distributor, Local, Part

log = logging.getLogger(__name__)

SECONDS_A_PART = 10.0  # a stop loses no more than this; millions of prompts still make few files
Score = Callable[[list[int], list[str]], pa.Table]  # of some prompts at these places, a row each


@dataclass(frozen=True)
class Spread:
    """Who scores the prompts, and which of them.

    Args:
        distributor: who.
        load: what gives another process the model and the scores, a function of a module; None: it is this process.
        part: these prompts alone, kept in `out`.
        merge: none; all have been scored, by their parts.
    """

    distributor: Distributor = field(default_factory=Local)
    load: Callable[[], tuple[Any, Sequence[Any]]] | None = None
    part: Part = field(default_factory=Part)
    merge: bool = False


@dataclass(frozen=True)
class ScoredPrompts:
    """`table`: a row a prompt of the part, in the list's order. `newly_scored`: of them, in so many `seconds`."""

    table: pa.Table
    newly_scored: int
    seconds: float


def score(
    prepare: Callable[[], Score], prompts: Sequence[str], chunks: Sequence[range], nothing: pa.Table,
    parts: Parts | None, spread: Spread, progress: bool,
) -> ScoredPrompts:  # fmt: skip
    """Scores of a part's prompts: those that are in `parts`, and those that are missing there.

    Args:
        prepare: what gives a worker what scores.
        chunks: places of prompts that are scored together, the same for any number of parts.
        nothing: scores of no prompt.

    Raises:
        ValueError: `spread.merge`, and some are missing; or another process does this part.
        OSError: some could not be scored, however often that was tried; the others are kept in `parts`.
    """
    with nullcontext() if parts is None else parts.alone(spread.part):
        tables = [] if parts is None else parts.read()
        done = {position for table in tables for position in table["position"].to_pylist()}
        if spread.merge and len(done) < len(prompts):
            raise ValueError(
                f"merge: {len(prompts) - len(done)} of {len(prompts)} prompts are not scored yet; do the other parts "
                "first, or leave merge out to score them here"
            )
        mine = [chunks[number] for number in spread.part.of(len(chunks))]
        tasks = [missing for chunk in mine if (missing := [place for place in chunk if place not in done])]
        count = sum(map(len, tasks))
        if done and tasks:
            log.info("%d of %d prompts are scored already; going on", len(done), len(prompts))
        started = time.perf_counter()
        tables += _run(spread.distributor, prepare, prompts, tasks, parts, progress)
        seconds = time.perf_counter() - started
    tables = [table.select(nothing.column_names) for table in tables]  # a finished one has more
    table = _once_each(pa.concat_tables([nothing, *tables]).sort_by("position"))
    own = [place for chunk in mine for place in chunk]
    return ScoredPrompts(table.filter(pa.array(np.isin(table["position"].to_numpy(), own))), count, seconds)


def _run(
    distributor: Distributor,
    prepare: Callable[[], Score],
    prompts: Sequence[str],
    tasks: list[list[int]],
    parts: Parts | None,
    progress: bool,
) -> list[pa.Table]:
    """Tables of the prompts at these places, saved on the way."""
    tables: list[pa.Table] = []
    left: list[tuple[int, str]] = []  # how many prompts, and why
    saved, last_save = 0, time.monotonic()
    columns = (
        TextColumn("scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("scoring", total=sum(map(len, tasks)))
        given = [(positions, [prompts[position] for position in positions]) for positions in tasks]
        scoring = distributor.run(_scored, given, prepare, lambda some: f"prompts {some[0][0]} to {some[0][-1]}")
        try:
            for done in scoring:
                if done.result is None:
                    left.append((len(tasks[done.index]), done.failure or ""))
                    continue
                tables.append(done.result)
                bar.advance(task, len(tasks[done.index]))
                if parts is not None and time.monotonic() - last_save > SECONDS_A_PART:
                    parts.add(pa.concat_tables(tables[saved:]))
                    saved, last_save = len(tables), time.monotonic()
        finally:  # a stop by hand keeps what is done
            if parts is not None and tables[saved:]:
                parts.add(pa.concat_tables(tables[saved:]))
    if left:
        kept = "the others are kept, and the same call tries these again" if parts is not None else "nothing is kept"
        raise OSError(f"{sum(count for count, _ in left)} prompts could not be scored ({left[0][1]}); {kept}")
    return tables


def _scored(scorer: Score, task: tuple[list[int], list[str]]) -> pa.Table:
    return scorer(*task)


def _once_each(table: pa.Table) -> pa.Table:
    """Sorted rows; of those of one position, which two processes may have made, the first."""
    places = table["position"].to_numpy()
    return table.filter(pa.array(np.diff(places, prepend=-1) > 0))
