"""Tables of baselines whose runs are the program on something tiny, or one that takes no time."""

import sys
from pathlib import Path

from memtrain.cli.sweep import stopped_by_signals
from memtrain.sweep.bench import Bench, alone
from memtrain.sweep.protocol import Planned, Protocol, plan
from memtrain.training.exit_codes import EXIT_CODES

# A program that takes no time, called as memtrain is. It goes on from the step that it kept, and writes down each.
QUICK = """
import json, pathlib, sys, time
command, *words = sys.argv[1:]
said = dict(word.split("=", 1) for word in words)
if command == "evaluate":
    assert "judge" not in said or pathlib.Path(said["judge"].strip("'")).is_dir()
    out = pathlib.Path(said["out"])
    out.mkdir()
    found = [{"group": "canary", "copy_rate_attacked": 0.5}, {"group": "reference", "copy_rate_attacked": 0.25}]
    (out / "evaluation.json").write_text(json.dumps([{"groups": found, "kernel_distance": 0.125}]))
    sys.exit(0)
folder = pathlib.Path(said["runs_dir"].strip("'")) / said["name"] / said["run_id"]
if "broken" in said:
    print("error: it is broken\\nand a last line")
    sys.exit(2)
while "waits" in said and not (folder.parent / said["waits"] / "run.json").exists():
    time.sleep(0.01)
assert ("resume" in said) == (folder / "config.yaml").exists()
(folder / "config.yaml").write_text("data: {shards: " + said["data.shards"] + "}\\nmodel: {pretrained: base}\\n")
(folder / "export").mkdir()
(folder / "canaries.csv").write_text("key,caption,group\\n" + "".join(f"k{n},c,canary\\n" for n in range(4)))
score = {"excluded_fraction": 0.0}
summary = {
    "samples_seen": 8, "steps": 4, "samples_per_second": 2.0, "copy_rate": {"canary": float(said["copies"])},
    "heldout_loss": 1.0 + int(said["seed"]), "score": {"train": score, "canary": score},
}
(folder / "summary.json").write_text(json.dumps(summary))
(folder / "run.json").write_text(json.dumps({"finished_at": 4}))
"""


def protocol(rows: dict[str, list[str]], *words: str, **more) -> Protocol:
    """One seed on the corpus `c`, and nothing is evaluated, unless `more` says otherwise."""
    rest = dict(make=[], cache=[], seeds=1, evaluate=[], judge=[], min_repeats=1, canaries=16, reference=16)
    return Protocol(**{"corpus": "c", "minutes": 1.0, "curves": [], **rest, **more}, words=list(words), rows=rows)


def planned(out: Path, rows: dict[str, list[str]], *words: str, **more) -> list[Planned]:
    return plan(protocol(rows, *words, **more), out)


def quick(folder: Path, runs: list[Planned], workers: int = 1) -> Bench:
    (folder / "quick.py").write_text(QUICK)
    return Bench(runs, [sys.executable, "-I", str(folder / "quick.py")], workers, workers, [])


def tiny(corpus: str, pipeline: str, out: str) -> list[Planned]:
    """Two rows of six steps on the tests' corpus and pipeline, a checkpoint after each step."""
    words = [
        "experiment=demo", f"model.pretrained={pipeline}", "logger=csv", "~logger.csv", "trainer=cpu",
        "data.batch_size=4", "canaries.count=3", "canaries.repeats=4", "canaries.file=null",
        "reference.count=8", "reference.batch_size=4", "trainer.max_steps=6", "optimizer.warmup_steps=2",
        "callbacks.validation.every=3", "callbacks.validation.timesteps_per_sample=2",
        "callbacks.checkpoint.every=1", "callbacks.copies.every=0", "callbacks.copies.num_inference_steps=2",
        "callbacks.copies.reference=2", "callbacks.copies.num_images_per_prompt=2", "callbacks.copies.shown=0",
        *(f"callbacks.{name}=null" for name in ("progress", "sample_grid", "memorized_table", "report")),
    ]  # fmt: skip
    rows = {
        "fixed": ["exclusion=fixed", "exclusion.threshold=0.5"],
        "one_visit": ["exclusion=none", "data.max_visits_per_group=1"],
    }
    return plan(protocol(rows, *words, corpus=corpus), Path(out))


def run_tiny(python: str, corpus: str, pipeline: str, out: str) -> None:
    """As `memtrain bench mitigation` does it; for a process of its own, too."""
    with alone(Path(out)):
        bench = Bench(tiny(corpus, pipeline, out), [python, "-m", "memtrain.cli.main"], 1, 1, [])
        with stopped_by_signals(bench, EXIT_CODES):
            bench.run()
    assert not bench.failed, bench.failed
