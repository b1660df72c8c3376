"""What a table of baselines is made of: rows of settings over seeds, each a run of its own, and how far each is.

A run's folder says all: there is no other record of a table, so that it goes on wherever it was stopped or killed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from memtrain.core.files import written_aside
from memtrain.sweep.space import key_of, merged, quoted

RUNS = "runs"  # in the table's folder
EVALUATION = "evaluation"  # these three in a run's folder
EVALUATED = "evaluated.csv"
JUDGE = "judge"  # the row of the training that judges the others' captions
_RECORD = "bench.json"
_OF_CAPTIONS = ("max_sequence_length", "t5_padding")  # keys of a model that decide how a caption is read
_OF_DATA = ("caption", "where", "cache_dir")
# what the bench says itself to each of its runs
_OWN = ("run_id", "run_dir", "name", "runs_dir", "resume", "resume.run", "resume.allow", "seed", "data.shards")


@dataclass(frozen=True)
class Protocol:
    """Rows of settings, which are compared on one corpus over several seeds.

    Args:
        corpus: `data.shards` of every run.
        make: words of the memtrain command that makes the corpus where it is not there yet; []: it has to be there.
        cache: words of `memtrain cache`, which encodes the corpus once before the runs, which read it then; []: each
            run encodes what it visits.
        words: overrides of `memtrain train` for every run.
        rows: name of a row -> its own overrides, which go before those of every run.
        seeds: each row is run with the seeds 0, 1, … up to so many.
        evaluate: overrides of `memtrain evaluate` on each finished model; []: it is not evaluated.
        judge: overrides of one more training, whose model judges captions in each evaluation: it should know such
            pictures, and have memorized none. Its seed is none of the rows'. []: no model judges.
        min_repeats: canaries with fewer repeats in an epoch are not evaluated.
        canaries, reference: so many of each, at most, are evaluated.
        minutes: that a run takes, about, on one core or GPU; for the time that is left, until a run has shown it.
        curves: rows whose dose curves are drawn; []: those of all.
    """

    corpus: str | None
    make: Sequence[str]
    cache: Sequence[str]
    words: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    seeds: int
    evaluate: Sequence[str]
    judge: Sequence[str]
    min_repeats: int
    canaries: int
    reference: int
    minutes: float
    curves: Sequence[str]

    def __post_init__(self):
        for name in ("min_repeats", "canaries", "reference", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"protocol.{name} must be >= 1, got {getattr(self, name)}")
        if not self.rows:
            raise ValueError("protocol.rows is empty; name at least one row with its words: {none: [exclusion=none]}")
        odd = [name for name in self.rows if not re.fullmatch(r"[\w.-]+", name)]
        if odd:
            raise ValueError(f"protocol.rows: {odd[0]!r} names a folder too; use letters, digits, _, - and .")
        if self.judge and JUDGE in self.rows:
            raise ValueError(f"protocol.rows: {JUDGE} is the training that judges the others; name the row otherwise")
        if not self.minutes > 0:
            raise ValueError(f"protocol.minutes must be > 0, got {self.minutes:g}")
        wrong = [name for name in self.curves if name not in self.rows]
        if wrong:
            raise ValueError(f"protocol.curves names {wrong[0]}, which is no row; there are {', '.join(self.rows)}")


@dataclass(frozen=True)
class TrainedAs:
    """What an audit is to be told of a run.

    Args:
        model: words that name what it exported: a pipeline, or an adapter and its base.
        told: words that say how pictures and captions were read.
        shards: that it was trained on.
    """

    model: list[str]
    told: list[str]
    shards: Any


def trained_as(run: Path) -> TrainedAs:
    """Of a run's folder, by its config.yaml and its export."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    export, model, data = run / "export", config["model"], config["data"]
    named = [f"model={export}"]
    if not (export / "model_index.json").is_file():
        named = [f"model={model['pretrained']}", f"lora={export}"]
        named += [] if model.get("config") is None else [f"model.config={model['config']}"]
    told = {name: model.get(name) for name in _OF_CAPTIONS} | {"resolution": data.get("resolution")}
    told |= {f"data.{name}": data.get(name) for name in _OF_DATA}
    texts = [f"{key}={quoted(value)}" for key, value in told.items() if isinstance(value, str)]
    numbers = [f"{key}={value}" for key, value in told.items() if isinstance(value, int)]
    return TrainedAs(named, [*texts, *numbers], data["shards"])


@dataclass(frozen=True)
class Planned:
    """A run of the table.

    Args:
        words: all overrides of `memtrain train`, but for those that say which run it is.
        folder: of the run.
        judge: folder of the run whose model judges this one's; None: it is not judged.
    """

    row: str
    seed: int
    words: tuple[str, ...]
    folder: Path
    protocol: Protocol
    judge: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.row}_seed{self.seed}"

    def to_train(self) -> list[str]:
        """Overrides of the training: a new run, or from the last checkpoint of one that was cut off."""
        table = self.folder.parent.parent
        named = [f"runs_dir={quoted(str(table))}", f"name={RUNS}", f"run_id={self.name}"]
        goes_on = [f"resume={quoted(str(self.folder))}"] if (self.folder / "config.yaml").exists() else []
        return [*self.words, *named, *goes_on]

    @property
    def evaluation(self) -> list[str]:
        """Overrides of the evaluation, but for those that say of which run it is; [] where there is none."""
        judged = [] if self.judge is None else [f"judge={quoted(str(self.judge / 'export'))}"]
        return [*self.protocol.evaluate, *judged] if self.protocol.evaluate else []

    def to_evaluate(self) -> list[str]:
        """Overrides of the evaluation of the model that the run exported: a pipeline, or an adapter and its base."""
        run = trained_as(self.folder)
        where = [f"data={run.shards}", f"samples={self.folder / EVALUATED}", f"out={self.folder / EVALUATION}"]
        count = max(self.protocol.canaries, self.protocol.reference)  # no group has more
        return [*run.model, *run.told, *where, f"samples.count={count}", *self.evaluation]


def plan(
    protocol: Protocol,
    out: Path,
    rows: Sequence[str] = (),
    seeds: int | None = None,
    overrides: Sequence[str] = (),
) -> list[Planned]:
    """The runs of a table, all rows of a seed before those of the next: so half a table has every row. The one that
    judges the others, where there is one, is the first.

    Args:
        rows: of the protocol; (): all.
        seeds: how many; None: as many as the protocol says.
        overrides: of every run, before those of the protocol; a row's own go before them.

    Raises:
        ValueError: a row is not there, or a key is the bench's own.
    """
    unknown = [row for row in rows if row not in protocol.rows]
    if unknown:
        raise ValueError(f"rows names {unknown[0]}, which the protocol has not; it has {', '.join(protocol.rows)}")
    seeds = protocol.seeds if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"seeds must be >= 1, got {seeds}")
    if protocol.corpus is None:
        raise ValueError("the protocol has no corpus of its own; name yours with shards=FOLDER")
    rows_words = [word for words in protocol.rows.values() for word in words]
    for override in (*protocol.words, *protocol.judge, *overrides, *rows_words):
        if key_of(override) in _OWN:
            raise ValueError(f"{override}: the bench names its runs itself; out=FOLDER seeds=N shards=FOLDER say which")
    cached = ["data.cache=beside"] if protocol.cache else []

    def made(row: str, seed: int, own: Sequence[str]) -> Planned:
        which = [f"seed={seed}", f"data.shards={quoted(protocol.corpus)}"]
        words = tuple(merged(cached, protocol.words, overrides, own, which))
        return Planned(row, seed, words, out.absolute() / RUNS / f"{row}_seed{seed}", protocol)

    runs = [made(row, seed, protocol.rows[row]) for seed in range(seeds) for row in rows or protocol.rows]
    if not (protocol.judge and protocol.evaluate):
        return runs
    judge = made(JUDGE, max(seeds, protocol.seeds), protocol.judge)
    judge = replace(judge, protocol=replace(protocol, evaluate=()))  # it is not evaluated itself
    return [judge, *(replace(run, judge=judge.folder) for run in runs)]


class Stage(Enum):
    """What is to be done next for a run."""

    TRAIN = "training"
    EVALUATE = "evaluation"
    NOTHING = "finished"


@dataclass
class Record:
    """What the bench keeps in a run's folder.

    Args:
        words: that the run was begun with.
        evaluated: words of its last evaluation; None: there was none.
        seconds: that it took so far, evaluation and earlier starts included.
    """

    words: list[str]
    evaluated: list[str] | None = None
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(folder / _RECORD) as aside:
            aside.write_text(json.dumps(vars(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(run: Planned) -> Record:
        """That of a run, new where it has none."""
        path = run.folder / _RECORD
        return Record(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else Record(list(run.words))


def check_words(runs: Sequence[Planned]) -> None:
    """Raises ValueError where a run was begun with other words: two different experiments make no row."""
    for run in runs:
        other = sorted(set(Record.read(run).words) ^ set(run.words))
        if other and (run.folder / "config.yaml").exists():
            raise ValueError(
                f"{run.folder} was begun with other words ({', '.join(other)}); delete that folder, or begin a new "
                "table with out=FOLDER"
            )


def next_stage(run: Planned) -> Stage:
    """What is left to do for a run, by what its folder holds."""
    if not is_trained(run.folder):
        return Stage.TRAIN
    if run.evaluation and Record.read(run).evaluated != run.evaluation:
        return Stage.EVALUATE
    return Stage.NOTHING


def can_begin(run: Planned) -> bool:
    """Whether what is next for a run needs nothing that is not there: an evaluation needs its judge."""
    return run.judge is None or next_stage(run) is not Stage.EVALUATE or is_trained(run.judge)


def is_trained(folder: Path) -> bool:
    """Whether a run has ended, with a summary."""
    return (folder / "summary.json").is_file() and _read_json(folder / "run.json").get("finished_at") is not None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or half of one
        return {}


@dataclass(frozen=True)
class Standing:
    """How far a table is.

    Args:
        left: runs that are neither finished nor failed; those that are going on, too.
        failed: name of a run -> its last words.
        seconds: that finished runs took, one each.
    """

    runs: int
    left: int
    failed: Mapping[str, str] = field(default_factory=dict)
    seconds: Sequence[float] = ()

    def seconds_left(self, workers: int, minutes: float, gone: float = 0.0) -> float:
        """About how long it will go on: what is left, by the mean of what was done, shared by the workers.

        Args:
            minutes: of a run, until one has shown it.
            gone: seconds, over all that are going on, since they were started.
        """
        each = sum(self.seconds) / len(self.seconds) if self.seconds else 60 * minutes
        share = max(1, min(workers, self.left))
        return max(0.0, self.left * each - min(gone, share * each)) / share
