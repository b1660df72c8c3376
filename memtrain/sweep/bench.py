"""The runs of a table, several at a time, each a process of its own; what is finished is kept."""

from __future__ import annotations

import csv
import fcntl
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memtrain.core.files import written_aside
from memtrain.report.curves import read_metrics
from memtrain.sweep.protocol import (
    EVALUATED,
    Planned,
    Protocol,
    Record,
    Stage,
    Standing,
    can_begin,
    is_trained,
    next_stage,
)
from memtrain.sweep.trial import Process, environment_of, spoken

log = logging.getLogger(__name__)

CANARY, REFERENCE, HELD_OUT = "canary", "reference", "held_out"  # groups, as training names them in its lists
_LOOK = 0.2  # s between two looks at the runs that are going on
_STOPPED = (75, 130, 143)  # exit codes of a run that somebody told to end: it wrote a checkpoint


@dataclass(frozen=True)
class Running:
    """A run that is going on."""

    run: Planned
    stage: Stage
    process: Process
    before: float  # seconds that it took at earlier starts, and for what is done

    @property
    def seconds(self) -> float:
        return self.before + self.process.seconds

    @property
    def step(self) -> int:
        """The newest step that it wrote anything at."""
        path = self.run.folder / "metrics.csv"
        columns = read_metrics(path) if path.exists() else {}
        return max((steps[-1] for steps, _ in columns.values()), default=0)


class Bench:
    """The runs of a table.

    Args:
        runs: in the order in which they are begun.
        command: the program, to which `train` or `evaluate` and overrides are appended.
        workers: runs at a time.
        cores: of the machine, which the runs share. As many as there are workers: a thread each, whatever the machine,
            so that a run's figures do not depend on how many go on beside it.
        devices: ids of the GPUs.
        changed: called whenever a run is over.
    """

    def __init__(
        self,
        runs: Sequence[Planned],
        command: Sequence[str],
        workers: int,
        cores: int,
        devices: Sequence[str],
        changed: Callable[[], None] = lambda: None,
    ):
        self.runs, self.command, self.workers = list(runs), list(command), workers
        self.cores, self.devices, self.changed = cores, devices, changed
        self.going: dict[int, Running] = {}  # by worker
        self.failed: dict[str, str] = {}  # a run's name -> its last words
        done = [run for run in self.runs if next_stage(run) is Stage.NOTHING]
        self.finished = {run.name: Record.read(run).seconds for run in done}  # a run's name -> seconds that it took
        self._waiting = [run for run in self.runs if run.name not in self.finished]
        self.stopped = False  # set by whoever wants `run` to return

    @property
    def standing(self) -> Standing:
        """How far the table is."""
        left = len(self.runs) - len(self.finished) - len(self.failed)
        seconds = [one for one in self.finished.values() if one > 0]
        return Standing(len(self.runs), left, dict(self.failed), seconds)

    def run(self, look: Callable[[], None] = lambda: None) -> None:
        """Begin and look after the runs until each is finished or has failed.

        What goes on when this is stopped is ended, with a checkpoint; the same runs go on from there.

        Args:
            look: called every now and then, in this thread.
        """
        try:
            while not self.stopped:
                for slot, going in list(self.going.items()):
                    if going.process.exit_code is not None:
                        del self.going[slot]
                        self._ended(slot, going)
                for slot in range(self.workers):
                    if slot not in self.going and (able := next(filter(can_begin, self._waiting), None)):
                        self._waiting.remove(able)
                        self._start(slot, able)
                look()
                if not self.going and not any(map(can_begin, self._waiting)):
                    for run in self._waiting:
                        self._fails(run, f"evaluation: what is to judge it, {run.judge}, is not there")
                    self._waiting.clear()
                    return
                time.sleep(_LOOK)
        finally:
            self._stop()

    def _start(self, slot: int, run: Planned) -> None:
        """Begin what is next for a run, or go on with it."""
        stage, record = next_stage(run), Record.read(run)
        try:
            if stage is Stage.TRAIN:
                record.words = list(run.words)
                words = ["train", *run.to_train()]
            else:
                write_evaluated(run)
                words = ["evaluate", *run.to_evaluate()]
            record.write(run.folder)
        except (OSError, ValueError) as error:  # of this run's folder
            self._fails(run, f"{stage.value}: {error}")
            return
        environment = environment_of(slot, self.workers, self.cores, self.devices)
        self.going[slot] = Running(
            run, stage, Process([*self.command, *words], run.folder, environment), record.seconds
        )
        log.info("%s: %s", run.name, stage.value)

    def _ended(self, slot: int, going: Running) -> None:
        """Take note of what became of a process; what is next for its run is begun at once, by the same worker,
        where it can be."""
        run, code = going.run, going.process.exit_code
        going.process.wait()
        record = Record.read(run)
        record.seconds = going.seconds
        if going.stage is Stage.EVALUATE and code == 0:
            record.evaluated = run.evaluation
        record.write(run.folder)
        said = going.process.last_words()
        over = is_trained(run.folder) if going.stage is Stage.TRAIN else code == 0
        if not over:
            told = " (somebody told it to end; the same command goes on)" if code in _STOPPED else ""
            self._fails(run, f"{going.stage.value}, exit code {code}: {said}{told}")
        elif code:  # trained and exported, but a look failed: its figures are there
            log.warning("%s: %s", run.name, said)
        if over and next_stage(run) is not Stage.NOTHING:
            if can_begin(run):
                self._start(slot, run)
            else:
                self._waiting.insert(0, run)
            return
        if over:
            self.finished[run.name] = record.seconds
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # what is finished is not gone on with
            log.info("%s: finished, in %s", run.name, spoken(record.seconds))
        self.changed()

    def _fails(self, run: Planned, said: str) -> None:
        self.failed[run.name] = said
        log.warning("%s failed: %s", run.name, said)

    def _stop(self) -> None:
        """End what is going on, all of it at once, and keep what time it took."""
        for going in self.going.values():
            going.process.let_go()
        for going in self.going.values():
            going.process.wait()
            record = Record.read(going.run)
            record.seconds = going.seconds
            record.write(going.run.folder)
        self.going.clear()


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold off another bench in the table's folder, which would begin the same runs. Raises ValueError where one is."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "bench.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another bench works on out={out}; wait for it, or choose another folder") from None
        except OSError:
            pass  # a file system without locks
        yield


def write_evaluated(run: Planned) -> None:
    """Write `evaluated.csv`, the samples that a finished model is evaluated on, from what the run says of its own.

    It names the rest of the reference set too, whose pictures are not to be searched as training pictures.
    """
    there = [run.folder / name for name in ("copies.csv", "canaries.csv") if (run.folder / name).is_file()]
    if not there:
        raise ValueError("it lists no canaries; leave callbacks.canaries as it is, or say protocol.evaluate=[]")
    lists = []
    for path in there:
        with path.open(newline="", encoding="utf-8") as file:
            lists.append(list(csv.DictReader(file)))
    chosen = evaluated(lists[0], run.protocol)
    judged = {row["key"] for row in chosen}
    others = [row["key"] for row in lists[-1] if row["group"] in (REFERENCE, HELD_OUT) and row["key"] not in judged]
    if not any(row["group"] == CANARY for row in chosen):
        log.warning("%s: no canary has %d repeats, so none is evaluated", run.name, run.protocol.min_repeats)
    with (
        written_aside(run.folder / EVALUATED) as aside,
        aside.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, ("key", "caption", "group"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(chosen)
        writer.writerows({"key": key, "group": HELD_OUT} for key in dict.fromkeys(others))


def evaluated(rows: Sequence[dict[str, str]], protocol: Protocol) -> list[dict[str, str]]:
    """Which rows of a run's `copies.csv`, or of `canaries.csv`, name what is evaluated: one a sample.

    Of the canaries with enough repeats so many as the protocol says, evenly spread, each by its first sample; of the
    reference set the first. Sacrificed canaries are not protected, and not evaluated.
    """
    enough = [row for row in rows if int(row.get("repeats") or protocol.min_repeats) >= protocol.min_repeats]
    canaries = {row.get("canary") or row["key"]: row for row in reversed(enough) if row["group"] == CANARY}
    ordered = list(reversed(canaries.values()))  # by the first row of each
    count = min(len(ordered), protocol.canaries)
    spread = [ordered[number * len(ordered) // count] for number in range(count)]
    reference = {row["key"]: row for row in rows if row["group"] == REFERENCE}
    return [*spread, *list(reference.values())[: protocol.reference]]
