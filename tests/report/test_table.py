import json

import pytest

from memtrain.report.table import table_over_seeds


def make_run(folder, copies: float, heldout: float | None = 0.05, excluded: float | None = 0.5):
    folder.mkdir(parents=True)
    less = None if excluded is None else excluded / 5
    groups = {"canary": {"excluded_fraction": excluded}, "train": {"excluded_fraction": less}}
    summary = {
        "steps": 100,
        "samples_seen": 1600,
        "samples_per_second": 32.0,
        "heldout_loss": heldout,
        "copy_rate": {"canary": copies},
        "score": groups,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_runs_that_differ_in_the_seed_alone_share_a_line(tmp_path):
    runs = [make_run(tmp_path / f"a_b_seed{seed}", copies) for seed, copies in enumerate((0.1, 0.2, 0.3))]
    runs.append(make_run(tmp_path / "none_seed0", 0.9, heldout=None, excluded=None))
    lines = table_over_seeds(runs).splitlines()
    assert lines[2] == "| a b | 3 | 20.0% ± 10.0% | 50.0% ± 0.0% | 10.0% ± 0.0% | 0.0500 ± 0.0000 | 2.00 ± 0.00 |"
    assert lines[3] == "| none | 1 | 90.0% | – | – | – | 2.00 |" and len(lines) == 4


def test_a_folder_that_names_no_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"SETTING_seedN, got .*other"):
        table_over_seeds([make_run(tmp_path / "other", 0.1)])
