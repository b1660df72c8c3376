"""The table of how well scores tell canaries from the reference set, against all pairs of visits."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from memtrain.core.exclusion import CANARY, REFERENCE
from memtrain.core.scores import ANCHORED, MAGNITUDE
from memtrain.report.separation import BINS, DIFFERENCE, LOW_LOSS, PARTS, main, separation
from tests.support.ledgers import visits, write

STEPS = 40


def both_scores(run, seed):
    """A ledger whose anchored scores tell canaries from the rest, but in the first quarter, where there are none."""
    rows = visits(4000, batch=4000 // STEPS, seed=seed)
    draw = np.random.default_rng(seed)
    second = draw.random(4000).astype(np.float32) + (rows.group == CANARY) * 0.3
    second[rows.step < STEPS // PARTS] = 0
    rows = replace(rows, second_score=second.astype(np.float32), scored=np.ones(4000, bool))
    write(run, rows, score=MAGNITUDE, second=ANCHORED)
    return rows


def test_each_area_is_the_share_of_pairs_in_order(tmp_path):
    rows = both_scores(tmp_path / "run", 0)
    for over_loss in (False, True):
        found = separation(tmp_path / "run", "canary", over_loss)
        root = np.sqrt(rows.loss) if over_loss else 1
        expected = {MAGNITUDE: rows.score / root, ANCHORED: rows.second_score / root}
        expected |= {} if over_loss else {LOW_LOSS: -rows.loss}
        assert list(found) == [*expected, DIFFERENCE]
        for name, score in expected.items():
            for part in range(1, PARTS):
                for bin_ in range(BINS):
                    here = (rows.step * PARTS // STEPS == part) & (rows.timestep * BINS // 1000 == bin_)
                    ours, theirs = (score[here & (rows.group == group)] for group in (CANARY, REFERENCE))
                    assert found[name][part, bin_] == pytest.approx((ours[:, None] > theirs).mean(), abs=1e-6)
                assert found[name][part, BINS] == pytest.approx(found[name][part, :BINS].mean())
        assert np.isnan(found[ANCHORED][0]).all() and not np.isnan(found[MAGNITUDE]).any()
        np.testing.assert_array_equal(found[DIFFERENCE], found[ANCHORED] - found[MAGNITUDE])


def test_the_command_puts_mean_and_spread_of_the_seeds_between_the_marks(tmp_path, monkeypatch, capsys):
    runs = [tmp_path / name for name in ("a", "b")]
    for seed, run in enumerate(runs):
        both_scores(run, seed)
    text = tmp_path / "results.md"
    text.write_text("before\n<!-- flow: begin -->\nold\n<!-- flow: end -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["separation", *map(str, runs), "--into", str(text), "--mark", "flow"])
    main()
    lines = text.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    areas = [separation(run, "canary", False)[MAGNITUDE][3, 4] for run in runs]
    row = next(line for line in lines if line.startswith("| magnitude | quarter 4 |"))
    assert row.split(" | ")[6] == f"{np.mean(areas):.2f} ± {np.std(areas, ddof=1):.2f}"
    assert sum(line.startswith("| anchored − magnitude |") for line in lines) == PARTS
    assert any(line.startswith("| anchored | quarter 1 | – |") for line in lines)

    write(tmp_path / "one", both_scores(tmp_path / "c", 2))
    for wrong, said in (
        ([tmp_path / "none"], "has no ledger"),
        ([tmp_path / "one", runs[0]], "runs of one table take the same scores"),
        ([*runs, "--into", tmp_path / "c"], "Is a directory"),
    ):
        monkeypatch.setattr(sys, "argv", ["separation", *map(str, wrong)])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert said in capsys.readouterr().err
