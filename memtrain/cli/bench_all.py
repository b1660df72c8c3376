"""`memtrain bench all`: every benchmark's ratios in one table, beside the last ones that were committed."""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from memtrain.core.files import written_aside
from memtrain.report.table import marks_of, put_between_marks

BEGIN, END = marks_of("bench")
COMMITTED = Path("docs/results.md")
MUCH = 0.15  # a share by which a ratio may differ from run to run
_ROW = re.compile(r"\| (?P<what>[^|]+) \| (?P<ratio>[\d.]+)x \|")


@dataclass(frozen=True)
class Ratio:
    """What a benchmark found, medians within one run: ours over theirs, or theirs over ours."""

    what: str
    value: float
    more_is_better: bool

    def against(self, before: float | None) -> str:
        """How it compares with an earlier one, in words."""
        if before is None:
            return "–"
        change = self.value / before - 1
        gained = change if self.more_is_better else -change
        return f"{before:.2f}x ({change:+.0%}{', WORSE' if gained < -MUCH else ''})"


def decoding(rounds: int) -> list[Ratio]:
    from memtrain.data.bench import measure_decoding

    found = measure_decoding(images=8, rounds=rounds)
    return [Ratio(f"decode a picture: faster than {name}", ratio, True) for name, ratio in found.speedup.items()]


def loading(rounds: int) -> list[Ratio]:
    from memtrain.data.bench import measure_loading

    with tempfile.TemporaryDirectory(prefix="memtrain-bench-") as folder:
        found = measure_loading(64, rounds, Path(folder))
    return [Ratio("load from shards: faster than webdataset with Pillow", found.speedup, True)]


def scoring(rounds: int) -> list[Ratio]:
    from memtrain.training.bench import BASELINE, measure_scoring

    found = measure_scoring("demo", rounds, batch_size=8)
    names = [name for name in found.ratio if name != BASELINE]
    return [Ratio(f"training step, scores {name}: time against none", found.ratio[name], False) for name in names]


def detection(rounds: int) -> list[Ratio]:
    from memtrain.audit.denoiser import Denoiser
    from memtrain.audit.detect.bench import measure_detection
    from memtrain.demo import PIPELINE
    from memtrain.demo.make_base import all_captions

    ratios = measure_detection(Denoiser.load(str(PIPELINE)), all_captions()[:128], rounds).ratios
    whole, stopped = "faster than the loop of all steps, decoded", "faster than the loop stopped at the scored step"
    return [
        Ratio(f"detect: {whole}", ratios["against_whole_loop"], True),
        Ratio(f"detect: {stopped}", ratios["against_stopped_loop"], True),
        Ratio(f"detect shared_noise=64: {whole}", ratios["shared_against_whole_loop"], True),
        Ratio(f"detect shared_noise=64: {stopped}", ratios["shared_against_stopped_loop"], True),
    ]


def start(rounds: int) -> list[Ratio]:
    """CPU time of commands that say something and end, over that of a Python that does nothing."""
    program = [sys.executable, "-m", "memtrain.cli.main"]
    commands = {
        "memtrain --help": [*program, "--help"],
        "memtrain train --help": [*program, "train", "--help"],
        "a key that is wrong": [*program, "train", "trainer.max_stepz=3"],
    }
    nothing = median(cpu_seconds([sys.executable, "-c", ""]) for _ in range(rounds))
    return [
        Ratio(
            f"{name}: CPU time against an empty Python", median(cpu_seconds(c) for _ in range(rounds)) / nothing, False
        )
        for name, c in commands.items()
    ]


def cpu_seconds(command: list[str]) -> float:
    """CPU time of a process from its beginning to its end, whatever it says and however it ends."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


BENCHES: tuple[Callable[[int], list[Ratio]], ...] = (start, decoding, loading, scoring, detection)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `memtrain bench all` takes."""
    parser.add_argument("--quick", action="store_true", help="a few rounds of each: three minutes on two quiet cores")
    parser.add_argument(
        "--against", type=Path, default=COMMITTED, metavar="FILE", help="with the last table (default docs/results.md)"
    )
    parser.add_argument("--into", type=Path, metavar="FILE", help="write the table there, between its marks")


def bench_all(args: argparse.Namespace) -> None:
    """Measure, print the table, and put it where it is to stand."""
    if args.into is not None and BEGIN not in (args.into.read_text(encoding="utf-8") if args.into.is_file() else ""):
        raise ValueError(f"--into {args.into} has no line {BEGIN}, between which and its end the table is to stand")
    before = committed(args.against)
    found = []
    for bench in BENCHES:
        print(f"{bench.__name__} …", file=sys.stderr, flush=True)
        found += bench(2 if args.quick else 6)
    text = table(found, before)
    print(text)
    if args.into is not None:
        whole = put_between_marks(args.into.read_text(encoding="utf-8"), table(found), BEGIN, END)
        with written_aside(args.into) as aside:
            aside.write_text(whole, encoding="utf-8")


def committed(path: Path) -> dict[str, float]:
    """The ratios of a table in this file, by what they are of; none where there is no such table."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    rows = _ROW.finditer(text[text.index(BEGIN) : text.index(END)]) if BEGIN in text and END in text else ()
    return {row["what"]: float(row["ratio"]) for row in rows}


def table(found: list[Ratio], before: dict[str, float] | None = None) -> str:
    """The ratios as Markdown, with those of before beside them where they are given."""
    beside = before is not None
    lines = ["| what | ratio | better |" + (" before |" if beside else "")]
    lines.append("| --- | --: | --- |" + (" --: |" if beside else ""))
    for one in found:
        last = f" {one.against(before.get(one.what))} |" if before is not None else ""
        lines.append(f"| {one.what} | {one.value:.2f}x | {'more' if one.more_is_better else 'less'} |{last}")
    return "\n".join(lines)
