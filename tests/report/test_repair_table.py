"""The table of repairs, from the files that a repair and its evaluations write."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memtrain.report.repair_table import BEFORE, read_figures, table


def evaluation(folder, **groups):
    """An evaluation.json of these groups: copies, copies under attack, loss."""
    folder.mkdir(parents=True)
    rows = [
        {"group": name, "copy_rate": copies, "copy_rate_attacked": attacked, "denoising_loss": loss}
        for name, (copies, attacked, loss) in groups.items()
    ]
    (folder / "evaluation.json").write_text(json.dumps([{"groups": rows}]))
    return folder


def test_a_row_a_method_over_models_and_losses_against_the_same_model_before(tmp_path):
    found = []
    for model, loss in (("one", 0.05), ("two", 0.08)):
        for row, change in ((BEFORE, 1.0), ("repelled", 1.02)):
            attacked = evaluation(tmp_path / model / row / "a", forgotten=(0.5, 0.75, 1), reference=(0, 0.25, 9.0))
            plain = evaluation(
                tmp_path / model / row / "p", untouched=(1.0, None, 1), reference=(0, None, loss * change)
            )
            written = tmp_path / model / row / "repair.json"
            written.write_text(
                json.dumps(
                    {"kept_drift": {"a": 0.2, "b": 0.4}, "alignment": {"after": 0.1}, "steps": 25, "reached": True,
                     "passes": {"steps": 50, "looks": 1}}
                )
            )  # fmt: skip
            before = next((one for one in found if (one.row, one.model) == (BEFORE, model)), None)
            repaired = None if row == BEFORE else written
            found.append(read_figures(row, model, attacked, plain, repaired, before, training=1000))
    assert [one.heldout_change for one in found if one.row == "repelled"] == [pytest.approx(0.02)] * 2
    lines = table(found, [BEFORE, "repelled", "not_yet"]).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| before | 2 | 50.0% ± 0.0% | 75.0% ± 0.0% |")
    assert "| +2.00% ± " in lines[3] and "0.300 ± 0.000" in lines[3] and "5.0% ± 0.0%" in lines[3]


def test_the_cut_is_that_of_the_evaluation_with_more_never_trained_captions(tmp_path):
    attacked = evaluation(tmp_path / "a", forgotten=(1.0, 1.0, 1), reference=(0, 0.5, 9.0))
    plain = evaluation(tmp_path / "p", untouched=(1.0, None, 1), reference=(0, None, 1.0))
    judged = json.loads((plain / "evaluation.json").read_text())
    (plain / "evaluation.json").write_text(json.dumps([judged[0] | {"cut": 0.4}]))
    rows = [("forgotten", False, 0.45), ("forgotten", True, 0.4), ("forgotten", True, 0.45), ("reference", True, 0.45)]
    named = [dict(zip(("group", "attacked", "latent_rmse"), row, strict=True)) for row in rows]
    pq.write_table(pa.Table.from_pylist(named), attacked / "rows.parquet")
    found = read_figures("repelled", "one", attacked, plain, None, None, training=1000)
    assert (found.copies, found.attacked, found.reference_attacked) == (0.0, 0.5, 0.0)
