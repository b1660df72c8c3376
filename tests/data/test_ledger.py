"""The ledger as files: size, what is drawn, what a run that begins leaves of it; the queries of docs/."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import memtrain
from memtrain.core.exclusion import CANARY, REFERENCE, TRAINED
from memtrain.core.streams import Stream, place_seed
from memtrain.data.ledger import SCHEMA, About, LedgerRows, LedgerWriter, begin, drawn, read_about, read_ledger
from tests.support.ledgers import laion_key, visits, write


def test_what_is_written_comes_back(tmp_path):
    rows = visits(5_000)
    write(tmp_path, rows, sample=0.5)
    table = memtrain.read_ledger(str(tmp_path)).to_table()
    assert table.schema.equals(SCHEMA) and read_about(tmp_path) == About(1000, 0.5)
    assert table["key"].to_pylist() == [laion_key(index) for index in rows.sample_index.tolist()]
    assert table["duplicate_of"].to_pylist() == [
        laion_key(0) if index and index % 100 == 0 else None for index in rows.sample_index.tolist()
    ]
    assert np.array_equal(table["group"].to_numpy() == "canary", rows.group == CANARY)
    for name in ("step", "timestep", "loss", "threshold", "kept"):
        assert np.array_equal(table[name].to_numpy(), getattr(rows, name))
    assert np.array_equal(table["score"].is_null().to_numpy(), ~rows.scored)
    assert np.array_equal(table["score"].drop_null().to_numpy(), rows.score[rows.scored])


@pytest.mark.parametrize("batch", [16, 32, 128])
def test_a_row_takes_at_most_sixteen_bytes(tmp_path, batch):
    """A part of 500 steps, every sample another, thresholds that change at every step in every bin."""
    count = 500 * batch
    rows = visits(count, batch)
    moving = np.random.default_rng(1).normal(2, 0.1, (500, 10)).astype(np.float32)
    scored = np.ones(count, bool)
    rows = LedgerRows(**rows.__dict__ | {"threshold": moving[rows.step, rows.timestep // 100], "scored": scored})
    write(tmp_path, rows)
    (part,) = (tmp_path / "ledger").iterdir()
    assert 8 < part.stat().st_size / count < 16


def test_keys_of_any_bytes_are_spelt_out(tmp_path):
    names = ["x.tar/é", "x.tar/a b", "x.tar/\udcff"]
    write(tmp_path, visits(3, samples=3), key=names.__getitem__)
    assert sorted(read_ledger(tmp_path).to_table()["key"].to_pylist()) == [
        "x.tar/\\udcff",
        "x.tar/a b",
        "x.tar/é",
    ]


def test_what_is_drawn_is_a_function_of_seed_step_and_sample():
    draw = np.random.default_rng(0)
    step, index = draw.integers(0, 10**6, 2000), draw.integers(0, 10**10, 2000)
    expected = [
        place_seed(3, Stream.LEDGER, s, i) < 0.1 * 2**63 for s, i in zip(step.tolist(), index.tolist(), strict=True)
    ]
    assert drawn(3, step, index, 0.1).tolist() == expected and 100 < sum(expected) < 300
    assert drawn(3, step, index, 1.0).all() and not np.array_equal(drawn(4, step, index, 0.1), expected)
    assert not (drawn(3, step, index, 0.1) & ~drawn(3, step, index, 0.5)).any()  # the larger holds the smaller


def test_a_run_begins_with_what_was_before_it(tmp_path):
    """Two ranks before, one after: the parts of all ranks are cut at the step."""
    run = tmp_path / "run"
    for rank in (0, 1):
        write(run, *(visits(320, first=first, seed=rank) for first in (0, 10, 20)), rank=rank)
    whole = read_ledger(run).to_table()
    begin(run / "ledger", 15, [])
    left = read_ledger(run).to_table()
    assert left.equals(whole.filter(pc.field("step") < 15)) and len(left) == 2 * 15 * 32
    assert read_about(run) == About(1000, 1.0)
    write(run, visits(32, first=15), rank=0)
    assert sorted(path.name for path in (run / "ledger").iterdir()) == [
        "rank0-000001.parquet", "rank0-000002.parquet", "rank0-000003.parquet",
        "rank1-000001.parquet", "rank1-000002.parquet",
    ]  # fmt: skip
    begin(run / "ledger", 0, [])
    assert not list((run / "ledger").iterdir())


def test_parts_are_taken_from_another_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(OSError("cross-device link")))
    write(tmp_path / "one", visits(64))
    begin(tmp_path / "two" / "ledger", 1, [tmp_path / "nowhere", tmp_path / "one" / "ledger"])
    assert len(read_ledger(tmp_path / "two").to_table()) == 32 and len(read_ledger(tmp_path / "one").to_table()) == 64


def test_many_rows_are_closed_before_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("memtrain.data.ledger._PART_ROWS", 100)
    (tmp_path / "ledger").mkdir()
    writer = LedgerWriter(tmp_path / "ledger", 0, laion_key, About(1000, 1.0))
    for first in range(0, 8):
        writer.add(visits(32, first=first))
    assert len(read_ledger(tmp_path).to_table()) == 256 and not writer.buffer
    writer.close_part()
    assert len(list((tmp_path / "ledger").iterdir())) == 2  # nothing added: no part


def test_a_folder_without_a_ledger_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no ledger; name a run's folder.*ledger=off"):
        read_ledger(tmp_path)


# ---- the queries of docs/guides/reading_the_report.md, with pyarrow; they were tried with DuckDB as they stand there


def test_the_three_questions_of_the_readme(tmp_path):
    def row(step, index, timestep, score, kept, group=TRAINED):
        return (step, index, index, group, timestep, score, score == score, 0.1, 2.0, kept, 0.0)

    nan = float("nan")
    table = [
        row(0, 0, 900, 3.0, True), row(1, 0, 100, 9.0, True),
        row(2, 0, 800, 5.0, False), row(3, 0, 700, nan, False),
        row(0, 1, 900, 1.0, True), row(2, 1, 950, 2.0, True),
        row(0, 2, 900, 8.0, False, REFERENCE),
    ]  # fmt: skip
    kinds = (
        np.int64,
        np.int64,
        np.int64,
        np.int8,
        np.int16,
        np.float32,
        bool,
        np.float32,
        np.float32,
        bool,
        np.float32,
    )
    columns = [np.array(column, kind) for column, kind in zip(zip(*table, strict=True), kinds, strict=True)]
    write(tmp_path, LedgerRows(*columns), key="abc".__getitem__)
    ledger = read_ledger(tmp_path)

    trained = pc.field("group") != "reference"
    noisy = ledger.to_table(filter=trained & (pc.field("timestep") >= 700) & pc.field("score").is_valid())
    memorized = noisy.group_by("key").aggregate([("score", "mean"), ("score", "count")])
    assert memorized.sort_by([("score_mean", "descending")]).to_pylist() == [
        {"key": "a", "score_mean": 4.0, "score_count": 2},
        {"key": "b", "score_mean": 1.5, "score_count": 2},
    ]
    excluded = ledger.to_table(filter=trained)
    excluded = excluded.append_column("out", pc.cast(pc.invert(excluded["kept"]), pa.int64()))
    often = excluded.group_by("key").aggregate([("out", "sum"), ("out", "mean")]).sort_by([("out_sum", "descending")])
    assert often.to_pylist()[0] == {"key": "a", "out_sum": 2, "out_mean": 0.5}
    visits = ledger.to_table(columns=["step", "score"], filter=pc.field("key") == "a").sort_by("step")
    assert visits["score"].to_pylist() == [3, 9, 5, None]
    assert pq.read_table(tmp_path / "ledger" / "rank0-000001.parquet").num_rows == 7
