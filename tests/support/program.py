"""The program in this process, and the words that make it train something tiny."""

from pathlib import Path

import pytest

from memtrain.cli.main import main
from memtrain.training.resume import checkpoints_in


def fails(capsys, *argv: str) -> str:
    """Run the program in this process; return the one line it ends with."""
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code not in (0, None) and len(lines) == 1
    return lines[0]


def small(corpus, pipeline, tmp_path) -> list[str]:
    return [
        "train",
        "experiment=demo_noto",
        "name=demo",
        f"data.shards={corpus}",
        f"model.pretrained={pipeline}",
        f"runs_dir={tmp_path}/runs",
        "run_id=one",
        "logger=csv",
        "data.batch_size=4",
        "canaries.count=3",
        "canaries.repeats=4",
        "reference.count=8",
        "reference.batch_size=4",
        "trainer.max_steps=4",
        "callbacks.progress=null",
        "callbacks.validation.every=2",
        "callbacks.validation.timesteps_per_sample=2",
        "callbacks.curves.every=2",
        "callbacks.checkpoint.every=2",
        "callbacks.copies.num_inference_steps=2",
        "callbacks.sample_grid.num_inference_steps=2",
    ]


def small_run(corpus: Path, pipeline: Path, runs: Path, *more: str, steps: int = 12) -> list[str]:
    """`memtrain train` on the tests' corpus, with a checkpoint every 4 steps and no pictures."""
    off = ("validation", "sample_grid", "copies", "memorized_table", "export", "report", "progress")
    off += ("canaries", "summary")
    return [
        "train",
        "experiment=demo_noto",
        f"data.shards={corpus}",
        f"model.pretrained={pipeline}",
        f"runs_dir={runs}",
        "name=faults",
        "logger=csv",
        "trainer=cpu",
        "data.batch_size=4",
        "canaries.count=3",
        "canaries.repeats=4",
        "reference.count=8",
        "reference.batch_size=4",
        f"trainer.max_steps={steps}",
        "optimizer.warmup_steps=2",
        "callbacks.curves.every=4",
        "callbacks.checkpoint.every=4",
        *(f"callbacks.{name}=null" for name in off),
        *more,
    ]


def saved(folder: Path) -> list[int]:
    """Steps of the checkpoints of `small_run(…, folder, "run_id=one")`."""
    return list(checkpoints_in(folder / "faults" / "one" / "checkpoints"))
