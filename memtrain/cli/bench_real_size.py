"""`memtrain bench real_size`: train, stop, resume, export and audit a model of its true size, and watch its memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from memtrain.training.resume import LAST, checkpoint_name

PYTHON = sys.executable
STOPPED_AT, STEPS = 2, 3
SPARE = 1.5 * 2**30  # bytes beside what must be there: libraries, and what a forward and a backward need for a moment
MEMORY = Path("/proc/meminfo")
_LOOK = 0.02  # s between two looks at a process


@dataclass(frozen=True)
class Phase:
    """A part of the bench. `peak`: the most memory that its process held meanwhile, libraries included."""

    name: str
    seconds: float
    peak: int  # bytes


@dataclass(frozen=True)
class RealSize:
    """What a model of true size took."""

    model: str
    trained: int  # weights
    gpu: int  # bytes that the training took on one at most; 0: it was on the CPU
    must: dict[str, int]  # bytes of what must be there, by what it is
    checkpoint: int  # bytes
    phases: list[Phase]

    @property
    def must_sum(self) -> int:
        return sum(self.must.values())

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)


def measure_real_size(
    pretrained: str, resolution: int, folder: Path, words: Sequence[str] = (), said: Callable[[str], object] = print
) -> RealSize:
    """Two steps with exclusion, average and gradient checkpointing; a checkpoint; the run is killed, and gone on with
    to a third step and its export; a prompt is scored on that.

    Args:
        pretrained: whose architecture it is, as of `memtrain bench memory`; its weights are random.
        resolution: side of the pictures, px.
        folder: is made, and removed at the end.
        words: more for `memtrain train`.
        said: is told what goes on.

    Raises:
        ValueError: the folder is there, memory or disk are lacking, or a part failed.
    """
    if not MEMORY.exists():
        raise ValueError("real_size reads from /proc how much memory a process holds, as Linux has it; run it there")
    if folder.exists():
        raise ValueError(f"--folder {folder} is there already; name one that is not, it is removed at the end")
    folder.mkdir(parents=True)
    try:
        return _measured(pretrained, resolution, folder.resolve(), words, said)
    finally:
        shutil.rmtree(folder)


def _measured(
    pretrained: str, resolution: int, folder: Path, words: Sequence[str], said: Callable[[str], object]
) -> RealSize:
    helper = [PYTHON, "-m", "memtrain.training.real_size"]
    arguments = [pretrained, str(resolution), str(folder)]
    with _watched([*helper, "needed", *arguments], folder) as process:
        process.wait()
    needs = json.loads((folder / "needs.json").read_text())
    must = needs["parts"]
    _check_room(folder, must)
    phases = []

    said("writing the model")
    with _watched([*helper, "make", *arguments], folder) as process:
        process.wait()
    phases.append(process.phase("write the model"))

    said(f"{STOPPED_AT} steps")
    checkpoints = folder / "runs" / "real_size" / "one" / "checkpoints"
    program = [PYTHON, "-m", "memtrain.cli.main"]
    train = [*program, "train", *_train_words(folder, resolution), *words]
    with _watched(train, folder) as process:
        process.wait(until=(checkpoints / LAST).is_symlink)  # then it is killed
    first = checkpoints / checkpoint_name(STOPPED_AT)
    size = first.stat().st_size
    phases += _of_a_run(process, folder, first, "start")

    said("going on with it")
    (folder / "marks").unlink()
    with _watched([*train, "resume=auto"], folder) as process:
        process.wait()
    last = checkpoints / checkpoint_name(STEPS)
    phases += _of_a_run(process, folder, last, "resume=auto, to the first step")
    gpu = max(mark["gpu"] for mark in _marks(folder))

    said("scoring a prompt on its export")
    export = folder / "runs" / "real_size" / "one" / "export"
    (folder / "prompts.txt").write_text("a photograph\n")
    shutil.rmtree(checkpoints)  # for the disk
    detect = [f"model={export}", f"prompts={folder / 'prompts.txt'}", f"out={folder / 'audit'}"]
    with _watched([*program, "detect", *detect, "num_images_per_prompt=1"], folder) as process:
        process.wait()
    phases.append(process.phase("detect, one prompt"))
    return RealSize(pretrained, needs["trained"], gpu, must, size, phases)


def _train_words(folder: Path, resolution: int) -> list[str]:
    looks = ("canaries", "validation", "copies", "sample_grid", "memorized_table", "report", "progress")
    return [
        "model=auto", f"model.pretrained={folder / 'model'}", "model.gradient_checkpointing=true",
        f"data.shards={folder / 'shards'}", f"data.resolution={resolution}", "data.batch_size=1", "data.num_workers=0",
        "data.duplicates=none", f"data.cache_dir={folder / 'cache'}", "exclusion=fixed", "exclusion.threshold=1e9",
        "logger=csv", f"runs_dir={folder / 'runs'}", "name=real_size", "run_id=one", f"trainer.max_steps={STEPS}",
        f"callbacks.checkpoint.every={STOPPED_AT}", "callbacks.checkpoint.keep=1",
        *(f"callbacks.{look}=null" for look in looks),
        "+callbacks.marks._target_=memtrain.training.real_size.Marks", f"+callbacks.marks.path={folder / 'marks'}",
    ]  # fmt: skip


def _of_a_run(process: Watched, folder: Path, checkpoint: Path, start: str) -> list[Phase]:
    """The phases of a training that has ended: until its first step, the steps, the checkpoint, and the export."""
    marks = _marks(folder)

    def times(event: str) -> list[float]:
        return [mark["time"] for mark in marks if mark["event"] == event]

    begins, ends, saves = times("step begins"), times("step ends"), times("checkpoint begins")
    saved = checkpoint.stat().st_ctime  # when it got its name
    phases = [process.phase(start, process.began, begins[0])]
    phases += [process.phase(f"a step ({n})", *span) for n, span in enumerate(zip(begins, ends, strict=False), 1)]
    phases.append(process.phase("checkpoint", saves[0], saved))
    if end := times("run ends"):
        phases.append(process.phase("end of the run, with the export", saved, end[0]))
    return phases


def _marks(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "marks").read_text().splitlines()]


def _check_room(folder: Path, must: dict[str, int]) -> None:
    """Raises ValueError where memory or disk are lacking for what must be there."""
    needed, free = sum(must.values()) + SPARE, available()
    if free < needed:
        raise ValueError(
            f"real_size needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.1f} GiB are available; use a "
            "larger machine, or --model with a smaller architecture"
        )
    # the model and its export, and two checkpoints: of the step before, and the one that is being written
    disk = 2 * must["weights"] + 2 * (must["weights"] + must["two moments"] + must["average"])
    there = shutil.disk_usage(folder).free
    if there < disk:
        raise ValueError(
            f"--folder {folder}: real_size writes about {disk / 2**30:.0f} GiB, {there / 2**30:.1f} GiB are free"
        )


def available() -> int:
    """Memory that programs can still have, in bytes, as Linux says."""
    lines = MEMORY.read_text().splitlines()
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return values["MemAvailable"]


# ---- a process whose memory is watched


class Watched:
    """A process that is going on, and what memory it held when: what it wrote itself, not the files that it maps."""

    def __init__(self, command: Sequence[str], log: Path):
        self.log, self.command = log, command
        self.began = self.ended = time.time()
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        self._held: list[tuple[float, int]] = []
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        status = Path(f"/proc/{self._process.pid}/status")
        while self._process.poll() is None:
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                held = sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
            except (OSError, KeyError):  # it has ended meanwhile
                break
            self._held.append((time.time(), held))
            time.sleep(_LOOK)

    def wait(self, until: Callable[[], bool] | None = None) -> None:
        """Wait for its end, or until something is so. Raises ValueError with its last words where it failed."""
        while self._process.poll() is None:
            if until is not None and until():
                return
            time.sleep(_LOOK)
        self.ended = time.time()
        if self._process.returncode or until is not None:
            words = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            code = self._process.returncode
            killed = " (killed, as where memory runs out)" if code == -signal.SIGKILL else ""
            raise ValueError(
                f"a part of the bench ended with code {code}{killed}: {(words or ['it said nothing'])[-1]}"
            )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._watcher.join()

    def phase(self, name: str, begin: float | None = None, end: float | None = None) -> Phase:
        """What it took between two times: from its beginning to its end, unless others are said."""
        begin, end = begin or self.began, end or self.ended
        held = [size for at, size in self._held if begin <= at <= end]
        return Phase(name, end - begin, max(held, default=0))


@contextmanager
def _watched(command: Sequence[str], folder: Path) -> Iterator[Watched]:
    """A process that ends with the block; a signal to this one ends it too."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    process = Watched(command, folder / "log")
    try:
        yield process
    finally:
        process.kill()
        signal.signal(signal.SIGTERM, before)


def shown(found: RealSize) -> str:
    """The figures as a table."""
    lines = [f"{found.model}, random weights, {found.trained / 1e6:,.1f} M trained, {os.cpu_count()} cores", ""]
    lines += [f"{name:<34}{size / 2**30:>8.2f} GiB" for name, size in found.must.items()]
    lines += [f"{'what must be there':<34}{found.must_sum / 2**30:>8.2f} GiB", ""]
    lines += [f"{'':<34}{'seconds':>8}{'peak memory':>16}{'of that sum':>14}"]
    lines += [
        f"{phase.name:<34}{phase.seconds:>8.1f}{phase.peak / 2**30:>12.2f} GiB{phase.peak / found.must_sum:>13.2f}x"
        for phase in found.phases
    ]
    if found.gpu:
        lines += [
            "",
            f"training took {found.gpu / 2**30:.2f} GiB of the GPU, {found.gpu / found.must_sum:.2f}x the sum",
        ]
    lines += ["", f"a checkpoint has {found.checkpoint / 1e9:.2f} GB"]
    return "\n".join(lines)


def as_json(found: RealSize) -> str:
    """The figures as JSON, sizes in bytes."""
    return json.dumps(asdict(found) | {"must_sum": found.must_sum, "peak": found.peak}, indent=2)
