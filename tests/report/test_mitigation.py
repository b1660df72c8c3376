"""The table of baselines, from what runs left in their folders."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memtrain.data.copies_file import CopyRow, write_copies
from memtrain.report.mitigation import by_row, pooled, read_result, spread, table, table_of_kinds, write

KINDS = ("matching", "template")


def write_run(folder, rate: float, seed: int, attacked: float | None = None) -> None:
    """A run with four canaries of two kinds, of doses 10 and 20, of whose eight generations each `rate` are copies."""
    folder.mkdir(parents=True)
    rows = []
    for canary in range(4):
        dose, key = 10 * (1 + canary // 2), f"k{canary}"
        mine = ("canary", canary, KINDS[canary % 2], dose, key, "=a|b")
        rows += [CopyRow(*mine, g, 0.1, 0.1, "k0", g < 8 * rate) for g in range(8)]
    rows += [CopyRow("reference", None, "", 0, f"r{n}", "c", 0, 1.0, 0.9, "k1", False) for n in range(5)]
    write_copies(folder / "copies.csv", rows)
    score = {"train": {"excluded_fraction": 0.01}, "canary": {"excluded_fraction": 0.5}}
    summary = {
        "copy_rate": {"canary": rate}, "heldout_loss": 0.05 + 0.01 * seed, "score": score, "steps": 100,
        "samples_seen": 1600, "samples_per_second": 32.0,
        "copies": {"cut": 0.3, "min_repeats": 20, "nearest": {"canary": {"rate": rate}}},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    if attacked is not None:
        groups = [
            {"group": "canary", "copy_rate_attacked": attacked},
            {"group": "reference", "copy_rate_attacked": 0.0},
        ]
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "evaluation.json").write_text(json.dumps([{"groups": groups, "kernel_distance": 0.5}]))


@pytest.fixture
def results(tmp_path):
    found = []
    for row, seed, rate, attacked in (("none", 0, 1.0, 1.0), ("none", 1, 0.5, 0.75), ("evidence", 0, 0.0, None)):
        write_run(tmp_path / f"{row}_seed{seed}", rate, seed, attacked)
        found.append(read_result(tmp_path / f"{row}_seed{seed}", row, seed))
    return found


def test_a_line_holds_means_over_seeds_and_a_row_without_a_run_is_there(results):
    lines = [line.strip("| ").split(" | ") for line in table(results, ["none", "evidence", "fixed"], 2).splitlines()]
    none, evidence, fixed = (dict(zip(lines[0], cells, strict=True)) for cells in lines[2:])
    assert none["copies of canaries"] == f"75.0% ± {np.std([1, 0.5], ddof=1):.1%}" and none["seeds"] == "2"
    assert none["copies under attack"].startswith("87.5% ± ") and none["held-out loss"] == "0.0550 ± 0.0071"
    assert none["steps/s"] == "2.00 ± 0.00" and none["excluded, canaries"] == "50.0% ± 0.0%"
    assert evidence["copies of canaries"] == "0.0%" and evidence["copies under attack"] == "–"
    assert evidence["seeds"] == "1 of 2" and fixed["seeds"] == "0 of 2" and set(list(fixed.values())[2:]) == {"–"}
    assert spread([None, 0.5], ".1%") == "50.0%"


def test_similarity_to_the_training_set_is_shown_where_it_was_measured(tmp_path):
    write_run(tmp_path / "none_seed0", 1.0, 0, attacked=1.0)
    rows = [dict(nearest_sscd=n / 10, group="canary", attacked=False) for n in range(11)]
    rows += [
        dict(nearest_sscd=1.0, group="canary", attacked=True),
        dict(nearest_sscd=0.9, group="reference", attacked=False),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "none_seed0" / "evaluation" / "rows.parquet")
    heads, _, line = table([read_result(tmp_path / "none_seed0", "none", 0)], ["none"], 1).splitlines()
    assert heads.endswith("| SSCD to the training set > 0.5 | its 95th percentile |")
    assert line.endswith(f"| {5 / 11:.1%} | 0.950 |")


def test_what_is_under_attack_is_judged_by_the_runs_own_cut(tmp_path):
    write_run(tmp_path / "none_seed0", 1.0, 0, attacked=1.0)  # the run's cut is 0.3; the evaluation's was another
    rows = [
        dict(latent_rmse=rmse, group=group, attacked=attacked)
        for group, attacked, distances in (
            ("canary", True, [0.1, 0.3, 0.31, 0.45]),
            ("canary", False, [0.1, 0.1]),
            ("reference", True, [0.29, 0.5, 0.9]),
        )
        for rmse in distances
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "none_seed0" / "evaluation" / "rows.parquet")
    figures = read_result(tmp_path / "none_seed0", "none", 0).figures
    assert figures.attacked == 0.5 and figures.reference_attacked == pytest.approx(1 / 3)
    assert figures.beyond_reach == 0.25  # 0.1 alone is nearer than what is described by itself, at 0.29
    summary = json.loads((tmp_path / "none_seed0" / "summary.json").read_text())
    (tmp_path / "none_seed0" / "summary.json").write_text(json.dumps(summary | {"copies": {}}))  # it drew nothing
    assert read_result(tmp_path / "none_seed0", "none", 0).figures.attacked == 1.0


def test_alignment_is_that_of_never_trained_captions_where_it_was_measured(tmp_path):
    write_run(tmp_path / "none_seed0", 1.0, 0, attacked=1.0)
    path = tmp_path / "none_seed0" / "evaluation" / "evaluation.json"
    [model] = json.loads(path.read_text())
    model["groups"][0] |= {"caption_margin": 0.5}
    model["groups"][1] |= {"caption_margin": 0.125}
    path.write_text(json.dumps([model]))
    heads, _, line = table([read_result(tmp_path / "none_seed0", "none", 0)], ["none"], 1).splitlines()
    assert heads.endswith("| steps/s | caption margin |") and line.endswith("| +12.5% |")


def test_seeds_share_their_canaries(results):
    none = by_row(results, ["none"])["none"]
    canaries = [row for row in pooled(none) if row.group == "canary"]
    assert {row.canary for row in canaries} == {0, 1} and len(canaries) == 2 * 2 * 8  # of dose 20 alone
    assert len({row.canary for row in pooled(none, every=True) if row.group == "canary"}) == 4
    assert table_of_kinds(results, ["none"]).splitlines()[-1] == "| none | 75.0% | 75.0% |"


def test_table_csv_plane_and_dose_curves_are_written(results, tmp_path):
    text = write(tmp_path, results, ["none", "evidence", "fixed"], 2, ["none", "evidence"], "said")
    assert (tmp_path / "table.md").read_text() == text + "\n" and text.endswith("\n\nsaid")
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [(row["row"], row["seed"], row["copies"], row["attacked"]) for row in rows] == [
        ("none", "0", "1.0", "1.0"), ("none", "1", "0.5", "0.75"), ("evidence", "0", "0.0", "")
    ]  # fmt: skip
    for name in ("plane.png", "dose_curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "0 of 2" in write(tmp_path / ".." / tmp_path.name, [], ["none"], 2, [], "nothing yet")
