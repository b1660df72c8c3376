"""Positions, rows and records: a corpus of three shards, one of which the filter empties, against a plain list."""

import numpy as np
import pytest

from memtrain.data.row_filter import FilteredRows
from memtrain.data.rows import SampleRows

RECORDS = [5, 4, 6]
PASSED = [[0, 2, 3, 4], [], [1, 2, 4, 5]]
EXCLUDED = {0: [0, 2], 2: [3]}  # rows: places among those that passed
SAMPLES = [(0, 2), (0, 4), (2, 1), (2, 2), (2, 4)]  # (shard, record), by position


@pytest.fixture
def rows(tmp_path) -> SampleRows:
    stems = [str(tmp_path / str(number)) for number in range(3)]
    for stem, passed in zip(stems, PASSED, strict=True):
        np.save(f"{stem}.npy", np.array(passed, dtype=np.int32))
    filtered = FilteredRows([len(passed) for passed in PASSED], stems)
    return SampleRows(RECORDS, filtered, {number: np.array(rows) for number, rows in EXCLUDED.items()})


def test_a_position_is_that_of_its_record(rows):
    assert len(rows) == len(SAMPLES) and rows.counts.tolist() == [2, 0, 3]
    for position, (number, record) in enumerate(SAMPLES):
        shard, row = rows.locate(position)
        assert (shard, PASSED[shard][row]) == (number, record)
        assert rows.samples_of(number)[position - rows.starts[number]] == record


def test_a_record_has_its_position_or_none(rows):
    every = [(number, record) for number, count in enumerate(RECORDS) for record in range(count)]
    expected = [SAMPLES.index(one) if one in SAMPLES else -1 for one in every]
    assert rows.positions_of(np.arange(len(every))).tolist() == expected
    some = np.array([2, 7, 9, 10, 14])
    assert rows.positions_of(some).tolist() == [expected[record] for record in some]


def test_what_belongs_to_rows_is_cut_to_samples(rows):
    for number, passed in enumerate(PASSED):
        mine = [record for shard, record in SAMPLES if shard == number]
        assert rows.without_excluded(number, np.array(passed, dtype=int)).tolist() == mine


def test_beyond_the_corpus_is_nothing(rows):
    for position in (-1, len(SAMPLES)):
        with pytest.raises(IndexError, match=f"sample {position} of 5"):
            rows.locate(position)


def test_without_a_filter_rows_are_records():
    rows = SampleRows([3, 2], FilteredRows([3, 2]), {})
    assert [rows.locate(position) for position in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert rows.positions_of(np.arange(5)).tolist() == list(range(5)) and rows.filtered.digest(0) is None
