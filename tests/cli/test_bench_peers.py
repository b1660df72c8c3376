"""`memtrain bench peers`, with a script in the place of others' that trains a line."""

import json
from pathlib import Path

import pytest
import torch

from memtrain.cli import bench_peers
from memtrain.cli.bench_peers import AMORTISED, CACHED, DIFFUSERS, PAPER, PLAIN, SCORED, Work, steps_of
from memtrain.cli.main import main
from memtrain.training import step_clock
from tests.support.program import fails

# As train_text_to_image.py is called, and as it begins.
PEER = """
import argparse, json, pathlib, torch
parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "resolution", "train_batch_size", "max_train_steps", "mixed_precision",
             "checkpointing_steps", "output_dir", "dataloader_num_workers", "seed", "learning_rate", "lr_scheduler",
             "lr_warmup_steps", "max_grad_norm"):
    parser.add_argument("--" + name, required=True)
parser.add_argument("--train_data_dir")
parser.add_argument("--dataset")
parser.add_argument("--hard_threshold")
parser.add_argument("--use_ema", action="store_true")
parser.add_argument("--center_crop", action="store_true")
args = parser.parse_args()
if args.train_data_dir:
    pictures = pathlib.Path(args.train_data_dir)
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 64 and all((pictures / row["file_name"]).is_file() for row in rows), rows
else:
    assert len(list(pathlib.Path(args.dataset).glob("*.txt"))) == 64 and args.hard_threshold
line = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(line.parameters())
for _ in range(int(args.max_train_steps)):
    line(torch.ones(4, 8)).sum().backward()
    optimizer.step()
"""


@pytest.mark.slow
def test_every_program_does_the_same_work_in_turn(forks, pipeline_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_peers, "PYTHON", str(forks.python))
    monkeypatch.setattr(bench_peers, "MODULES", ())
    (tmp_path / "train_text_to_image.py").write_text(PEER)
    words = ["bench", "peers", "--only", "training", "--diffusers", str(tmp_path), "--paper", str(tmp_path)]
    sizes = ["--model", str(pipeline_folder), "--resolution", "64", "--batch-size", "2", "--rounds", "1"]
    main([*words, *sizes, "--steps", "1", "--json", "--settings", "optimizer.fused=true", "model.channels_last=true"])
    steps = json.loads(capsys.readouterr().out)["training"]
    assert list(steps) == [PLAIN, SCORED, CACHED, AMORTISED, DIFFUSERS, PAPER]
    assert all(len(step["seconds"]) == 1 and step["seconds"][0] > 0 for step in steps.values())
    assert list(steps[SCORED]["against"]) == [DIFFUSERS, PAPER] and steps[PLAIN]["against"][DIFFUSERS][0] > 1


def test_ratios_are_of_the_same_round_and_by_the_clock_that_fits():
    rounds = {
        PLAIN: [{"wall": 9.0, "cpu": 1.0, "flops": 4e9, "peak_flops": 8e9}, {"wall": 9.0, "cpu": 3.0}],
        DIFFUSERS: [{"wall": 1.0, "cpu": 2.0, "flops": 4e9, "peak_flops": 8e9}, {"wall": 1.0, "cpu": 4.0}],
    }
    work = Work(Path("model"), 64, 8, 2, 4, threads=1, precision="no")
    steps = steps_of(rounds, work)
    assert steps[PLAIN].against == {DIFFUSERS: [0.5, 0.75]} and steps[PLAIN].seconds == [1.0, 3.0]
    assert steps[PLAIN].images_per_second == 4 and steps[PLAIN].share_of_peak == 0.25
    several = Work(Path("model"), 64, 8, 2, 4, threads=2, precision="no")
    assert steps_of(rounds, several)[PLAIN].against == {DIFFUSERS: [9.0, 9.0]}


def test_the_clock_counts_what_a_step_does(monkeypatch, tmp_path):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(step_clock.os, "_exit", end)
    monkeypatch.setattr(step_clock, "peak_flops", lambda: 1e9)
    clock = step_clock.StepClock(str(tmp_path / "found.json"), warmup=1, steps=2, count=True)
    weight = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = torch.optim.SGD([weight], lr=1)
    optimizer.register_step_post_hook(clock.step_ends)
    steps = []
    with pytest.raises(SystemExit):
        while len(steps) < 9:
            steps.append("one")
            (torch.ones(7, 3) @ weight).sum().backward()
            optimizer.step()
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(steps) == 1 + 2 + 1  # the last one is counted
    assert found["flops"] == 2 * (2 * 7 * 3 * 5)  # forward, and of two products backward the one that is needed
    assert found["wall"] > 0 and found["cpu"] > 0


def test_spans_that_overlap_count_once():
    assert step_clock.union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_what_is_missing_is_said_before_anything_is_measured(capsys, tmp_path):
    (script := tmp_path / "train_text_to_image.py").write_text("")
    assert "--diffusers=nowhere: no such file; name train_text_to_image.py" in fails(
        capsys, "bench", "peers", "--diffusers", "nowhere"
    )
    assert "pip install --target FOLDER" in fails(capsys, "bench", "peers", "--paper", str(script))
    assert "peers' scripts train Stable Diffusion 1 and 2" in fails(capsys, "bench", "peers", "--model", str(tmp_path))
    assert "--rounds must be >= 1, got 0" in fails(capsys, "bench", "peers", "--rounds", "0")
