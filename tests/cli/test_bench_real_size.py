"""`memtrain bench real_size`, on a tiny architecture."""

import json
import sys

import pytest

from memtrain.cli import bench_real_size
from memtrain.cli.bench_real_size import Watched
from memtrain.cli.main import main
from tests.support.program import fails


@pytest.mark.slow
def test_a_run_is_killed_gone_on_with_exported_and_audited(forks, pipeline_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_real_size, "PYTHON", str(forks.python))
    folder = tmp_path / "here"
    words = ["--model", str(pipeline_folder), "--resolution", "64", "--folder", str(folder)]
    main(["bench", "real_size", *words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [phase["name"] for phase in found["phases"]] == [
        "write the model", "start", "a step (1)", "a step (2)", "checkpoint", "resume=auto, to the first step",
        "a step (1)", "checkpoint", "end of the run, with the export", "detect, one prompt",
    ]  # fmt: skip
    assert found["trained"] * 4 == found["must"]["average"] == found["must"]["gradients"]
    assert found["checkpoint"] > 4 * found["must"]["average"] and not folder.exists()


def test_memory_and_disk_that_are_lacking_are_said_in_one_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "there").mkdir()
    assert "is there already" in fails(capsys, "bench", "real_size", "--folder", str(tmp_path / "there"))
    must = {"weights": 4, "gradients": 2**40, "two moments": 0, "average": 0}
    with pytest.raises(ValueError, match=r"needs about 1026 GiB of memory, .* GiB are available; use a larger machine"):
        bench_real_size._check_room(tmp_path, must)
    with pytest.raises(ValueError, match=r"writes about 4096 GiB, .* GiB are free"):
        monkeypatch.setattr(bench_real_size, "available", lambda: 2**50)
        bench_real_size._check_room(tmp_path, must | {"weights": 2**40})


def test_what_a_process_writes_counts_and_its_last_words_are_told(tmp_path):
    code = "import time; held = bytearray(64 << 20); time.sleep(0.2); raise SystemExit('no more')"
    process = Watched([sys.executable, "-SI", "-c", code], tmp_path / "log")
    with pytest.raises(ValueError, match="ended with code 1: no more"):
        process.wait()
    process.kill()
    assert 64 << 20 <= process.phase("all").peak < 128 << 20
    assert process.phase("before", process.began - 2, process.began - 1).peak == 0
