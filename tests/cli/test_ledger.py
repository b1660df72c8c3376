"""`memtrain ledger`: who looks memorized is found, at the rate that was asked for, and can be left out."""

import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memtrain.audit import suspects
from memtrain.audit.suspects import judge, z_scores
from memtrain.cli.ledger import ledger
from memtrain.core.exclusion import CANARY, REFERENCE, TRAINED
from memtrain.data.ledger import KeyNumbers, LedgerRows
from tests.conftest import build_data
from tests.support.ledgers import write

MEMORIZED, ORDINARY, HELD_OUT = 20, 3000, 600


def simulated(
    seed: int = 0,
    reference: int = HELD_OUT,
    steps: int = 1000,
    memorized_by: float = 3.0,
    spread: float = 0.5,
) -> LedgerRows:
    """Scores depend on the timestep and drift; memorized samples rise at high noise and are seen more.

    `memorized_by`: at the end; 3 gives a single visit an AUC of 0.97, as docs/method.md says of a diffusion model.
    `spread`: of samples around the mean, whatever the visit, in standard deviations of a visit.
    """
    draw = np.random.default_rng(seed)
    count = MEMORIZED + ORDINARY + reference
    often = np.concatenate([np.full(MEMORIZED, 60), draw.integers(1, 8, ORDINARY), np.full(reference, 12)])
    index = np.repeat(np.arange(count), often)
    group = np.repeat([CANARY, TRAINED, REFERENCE], [MEMORIZED, ORDINARY, reference])[index]
    step, timestep = draw.integers(0, steps, len(index)), draw.integers(0, 1000, len(index))
    z = draw.normal(0, spread, count)[index] + draw.normal(0, 1, len(index))
    z += memorized_by * (index < MEMORIZED) * (timestep >= 700) * step / steps
    log_score = 1.0 - timestep / 700 + 0.5 * step / steps + 0.3 * z
    order = np.argsort(step, kind="stable")
    score = np.exp(log_score).astype(np.float32)
    rows = LedgerRows(
        step, index, index, group.astype(np.int8), timestep.astype(np.int16), score, np.ones(len(index), bool),
        np.full(len(index), 0.1, np.float32), np.full(len(index), 3, np.float32), score < 3,
        np.zeros(len(index), np.float32),
    )  # fmt: skip
    return rows.where(order)


@pytest.mark.parametrize("reference", [HELD_OUT, 0])
def test_a_row_of_the_ledger_takes_few_bytes_to_judge(tmp_path, monkeypatch, reference):
    """NumPy's peak, and what Arrow holds meanwhile: unlike resident memory the same on every machine."""
    few = simulated(reference=reference)
    rows = LedgerRows.concatenate([few] * 12)
    write(tmp_path, rows, key=key)
    judge(tmp_path)  # imports and the like
    before, held = pa.total_allocated_bytes(), []
    monkeypatch.setattr(
        suspects, "z_scores", lambda *rows: held.append(pa.total_allocated_bytes() - before) or z_scores(*rows)
    )
    tracemalloc.start()
    try:
        judged = judge(tmp_path)
        peak = tracemalloc.get_traced_memory()[1] + held[0]
    finally:
        tracemalloc.stop()
    assert judged.rows == len(rows) > 150_000 and peak < 60 * len(rows)


def test_samples_are_numbered_as_they_come_whatever_the_pieces():
    keys = pa.array([f"key {n}" for n in np.random.default_rng(0).integers(0, 300, 2000)])
    whole = keys.dictionary_encode()
    for size in (1, 7, 2000):
        numbers = KeyNumbers()
        found = np.concatenate([numbers.of(keys[first : first + size]) for first in range(0, len(keys), size)])
        assert np.array_equal(found, whole.indices.to_numpy()) and numbers.keys.equals(whole.dictionary)
        assert found.dtype == np.int32


def key(index: int) -> str:
    return f"00000.tar/{index:09d}"


def test_suspects_are_the_memorized_at_the_rate_asked_for(tmp_path, capsys):
    write(tmp_path, simulated(), key=key)
    out = tmp_path / "list.parquet"
    ledger(["suspects", str(tmp_path), "--out", str(out)])
    table = pq.read_table(out)
    found = {int(name.split("/")[1]) for name in table["key"].to_pylist()}
    hits, others = sum(i < MEMORIZED for i in found), sum(i >= MEMORIZED for i in found)
    judged = judge(tmp_path)
    assert hits >= 15 and 0.001 < others / len(judged.table) < 0.02
    assert max(found) < MEMORIZED + ORDINARY  # the reference set is not trained on
    assert table["p_value"].to_numpy().max() <= 0.01 and set(table["group"].to_pylist()) == {
        "canary",
        "train",
    }
    strongest = table.slice(0, 10)["key"].to_pylist()
    assert sum(int(name.split("/")[1]) < MEMORIZED for name in strongest) >= 8
    text = capsys.readouterr().out
    assert f"{len(found)} of {len(judged.table)} pictures look memorized" in text and "00000.tar/" in text
    assert "WARNING" not in text


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_rate_holds_for_samples_of_few_visits_and_of_many(tmp_path, spread):
    write(tmp_path, simulated(1, memorized_by=0.0, spread=spread), key=key)
    table = judge(tmp_path).table
    p, visits = table["p_value"].to_numpy(), table["counted_visits"].to_numpy()
    for some in (visits == 1, (visits > 1) & (visits < 10), visits >= 10):
        share = (p[some] <= 0.1).mean()
        assert abs(share - 0.1) < 0.04 + 2 * (0.09 / some.sum()) ** 0.5


@pytest.mark.parametrize(("score", "counted_from"), [("magnitude", 700), ("anchored", 0)])
def test_columns_are_what_they_say(tmp_path, score, counted_from):
    rows = simulated()
    write(tmp_path, rows, key=key, score=score)
    for row in judge(tmp_path).table.slice(0, 5).to_pylist():
        mine = rows.sample_index == int(row["key"].split("/")[1])
        counted = mine & (rows.timestep >= counted_from)
        assert (row["visits"], row["counted_visits"]) == (mine.sum(), counted.sum())
        assert row["mean_score"] == pytest.approx(rows.score[mine].mean(), rel=1e-5)
        assert row["excluded_share"] == pytest.approx((~rows.kept[mine]).mean())


def test_z_scores_leave_the_sample_itself_out():
    draw = np.random.default_rng(0)
    sample, cells = draw.integers(0, 12, 300), draw.integers(0, 4, 300)
    values, compared = draw.normal(3, 2, 300), np.arange(12) < 8
    z, counts = z_scores(values, sample, cells, compared)
    assert counts.all()
    for row in range(0, 300, 7):
        others = compared[sample] & (cells == cells[row]) & (sample != sample[row])
        assert z[row] == pytest.approx((values[row] - values[others].mean()) / values[others].std(ddof=1))
    _, counts = z_scores(values[:6], sample[:6], np.arange(6), compared)
    assert not counts.any()  # nobody to compare with


def test_memorized_samples_that_never_stood_out_are_found_by_their_rise(tmp_path):
    """As pictures that are simply far below the others when training begins."""
    rows = simulated(memorized_by=0.0, spread=0.5)
    planted, high = rows.sample_index < MEMORIZED, rows.timestep >= 700
    rise = 0.3 * np.where(planted & high, 4.5 * rows.step / 1000 - 3.0, 0.0)
    write(tmp_path, LedgerRows(**rows.__dict__ | {"score": (rows.score * np.exp(rise)).astype(np.float32)}), key=key)
    table = judge(tmp_path).table
    numbers = [int(name.split("/")[1]) for name in table["key"].to_pylist()]
    p = dict(zip(numbers, table["p_value"].to_numpy(), strict=True))
    assert np.mean([p[i] <= 0.01 for i in range(MEMORIZED)]) >= 0.8


def test_without_a_reference_set_it_says_so(tmp_path, capsys):
    write(tmp_path, simulated(reference=0), key=key)
    ledger(["show", str(tmp_path), "--top", "3"])
    said = capsys.readouterr()
    assert "WARNING: the run scored no reference set" in said.err and "reference.batch_size=16" in said.err
    assert len(re.findall(r"00000\.tar/", said.out)) == 3
    judged = judge(tmp_path)
    assert not judged.has_reference and len(judged.suspects(0.05)) >= MEMORIZED


def test_wrong_requests_are_named(tmp_path):
    write(tmp_path / "run", simulated(reference=40), key=key)
    out = tmp_path / "list.parquet"
    request = ["suspects", str(tmp_path / "run"), "--out", str(out)]
    with pytest.raises(ValueError, match=r"3\d samples to compare with cannot tell.*0\.01; ask for at least 0\.02"):
        ledger(request)
    assert not out.exists() and list(tmp_path.iterdir()) == [tmp_path / "run"]
    with pytest.raises(ValueError, match="share between 0 and 1, got 1"):
        ledger([*request, "--false-positive-rate", "1"])
    ledger([*request, "--false-positive-rate", "0.05"])
    with pytest.raises(ValueError, match="is there already"):
        ledger([*request, "--false-positive-rate", "0.05"])
    with pytest.raises(ValueError, match="has no ledger"):
        ledger(["show", str(tmp_path)])
    with pytest.raises(ValueError, match="--help says more"):
        ledger(["suspects", str(tmp_path)])


def test_a_ledger_without_scores_is_named(tmp_path):
    rows = simulated()
    write(tmp_path, LedgerRows(**rows.__dict__ | {"scored": rows.scored & False}), key=key)
    with pytest.raises(ValueError, match="no scores that count"):
        judge(tmp_path)


def test_keys_are_escaped_on_the_terminal(tmp_path, capsys):
    write(tmp_path, simulated(), key=lambda index: f"[red]x\x1b[31m.tar/{index}")
    ledger(["show", str(tmp_path), "--top", "2"])
    said = capsys.readouterr().out
    assert "\x1b[31m" not in said and "[red]x\\x1b[31m.tar/" in said


def test_the_suspects_of_a_run_are_left_out_of_the_next(corpus, tmp_path):
    samples = build_data(corpus).samples
    rows = simulated()
    here = rows.sample_index < len(samples)
    write(
        tmp_path,
        rows.where(here | (rows.group == REFERENCE)),
        key=lambda i: samples.key(i) if i < 48 else key(i),
    )
    ledger(["suspects", str(tmp_path), "--out", str(tmp_path / "list.parquet")])
    named = set(pq.read_table(tmp_path / "list.parquet")["key"].to_pylist())
    left = build_data(corpus, exclude_keys=str(tmp_path / "list.parquet")).samples
    keys = {left.key(index) for index in range(len(left))}
    assert named and not keys & named and len(keys) == len(samples) - len(named)
