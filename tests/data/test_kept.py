"""What is computed once and kept in the cache folder: by ranks that start together, and when it is damaged."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memtrain.data import find_pictures as finding
from memtrain.data import index as indexing
from memtrain.data.find_pictures import find_pictures
from memtrain.data.images import BadSample
from memtrain.data.index import open_indexes, open_remote_indexes, write_index
from memtrain.data.kept import read_array
from memtrain.data.remote import ShardCache, ShardMissing
from memtrain.data.samples import ShardSamples
from tests.support.corpora import encode, sample, textured, write_tar
from tests.support.forks import PATIENCE

fork = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
SHARDS, ROWS = 6, 5


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "shards"
    for number in range(SHARDS):
        parts = [
            sample(f"{number}{row:03d}", encode(textured(row, (96, 48 + 16 * row))), f"{row}",
                   json_bytes=json.dumps({"row": row}).encode())
            for row in range(ROWS)
        ]  # fmt: skip
        write_tar(folder / f"{number:05d}.tar", [member for part in parts for member in part])
    return folder


def opened(corpus, cache, **options):
    return ShardSamples(str(corpus), 64, cache_dir=cache, where="row != 1", max_aspect_ratio=2.0, bucket_multiple=16,
                        **options)  # fmt: skip


def state(samples):
    pictures = find_pictures(samples, "near", 1)
    buckets = [samples.buckets(number).tolist() for number in range(SHARDS)]
    return [samples.counts.tolist(), dict(samples.rows.filtered.dropped), buckets, pictures.positions.tolist()]


def start(barrier, answers, corpus, cache):
    """A rank: what it found, and how many shards it hashed itself."""
    hashed, write = [], finding._write_hashes

    def count(part):
        hashed.append(part)
        return write(part)

    finding._write_hashes = count
    barrier.wait()
    try:
        answers.put((state(opened(corpus, cache)), len(hashed)))
    except BaseException as error:
        answers.put((repr(error), 0))
        raise


@pytest.mark.parametrize("trial", range(3))
def test_ranks_that_start_together_find_the_same_and_share_the_work(corpus, tmp_path, trial):
    barrier, answers = fork.Barrier(4), fork.Queue()
    ranks = [fork.Process(target=start, args=(barrier, answers, corpus, tmp_path / "cache")) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = [answers.get(timeout=PATIENCE) for _ in ranks]
    for rank in ranks:
        rank.join()
    expected = state(opened(corpus, tmp_path / "alone"))
    assert expected[0] == [ROWS - 1] * SHARDS and len(expected[3]) == SHARDS * (ROWS - 1)
    assert [what for what, _ in found] == [expected] * 4
    assert sum(hashed for _, hashed in found) == SHARDS


def test_a_changed_parquet_is_filtered_anew(corpus, tmp_path):
    def write(rows):
        keys = [f"0{row:03d}" for row in range(ROWS)]
        pq.write_table(pa.table({"key": keys, "row": rows}), corpus / "00000.parquet")

    write(list(range(ROWS)))
    assert opened(corpus, tmp_path / "cache").counts[0] == ROWS - 1
    write([1, 1, 1, 1, 0])
    assert opened(corpus, tmp_path / "cache").counts[0] == 1


def damaged(file, how):
    data = file.read_bytes()
    if how == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "foreign":
        file.write_bytes(b"PK\x03\x04" + data)
    else:  # a header of as many bytes, that promises a shape of its own
        begin, end = data.index(b"'shape'"), data.index(b"}")
        header = b"'shape': (99999999999999,), "
        file.write_bytes(data[:begin] + header.ljust(end - begin)[: max(end - begin, len(header))] + data[end:])


@pytest.mark.parametrize("how", ["cut", "empty", "foreign", "absurd"])
def test_damaged_files_of_the_cache_are_made_again(corpus, tmp_path, how):
    cache = tmp_path / "cache"
    expected = state(opened(corpus, cache))
    kept = [path for path in cache.rglob("*") if path.suffix in (".npy", ".json")]
    assert {path.parent.name for path in kept} == {"index", "where", "buckets", "hashes", "pictures"}
    for path in kept:
        damaged(path, how if path.suffix == ".npy" else "cut")
    assert state(opened(corpus, cache)) == expected
    for path in kept:  # their like alone
        if path.suffix == ".npy":
            damaged(path, how)
    assert state(opened(corpus, cache)) == expected


WRONG_JSON = {
    "no json": b"[",
    "a list": b"[]",
    "a text for a count": {"samples": "5"},
    "a fraction": {"samples": 5.0},
    "a truth": {"samples": True},
    "below 0": {"samples": -1},
    "too many": {"samples": 6},
    "a size below 0": {"size": -1},
    "a wrong list": {"skipped": [1, 2]},
    "no list": {"skipped": None},
    "a time in words": {"mtime_ns": "now"},
    "too deep": b"[" * 100_000,
}


def remote(corpus, tmp_path, change):
    """The index of a shard behind an URL, beside which lies what `change` made of its index."""
    for tar in corpus.glob("*.tar"):
        write_index(tar, hashed=True)
    change(corpus / "00000.tar.index.json", corpus / "00000.tar.index.npy")
    cache = tmp_path / "cache"
    url = f"file://localhost{corpus}/00000.tar"
    [index] = open_remote_indexes([url], cache, ShardCache(cache / "shards", 10**9, backoff_s=0.001))
    return index


@pytest.fixture
def expected(corpus, tmp_path):
    [index] = open_indexes([str(corpus / "00000.tar")], tmp_path / "plain", 1)
    return index.records().copy()


@pytest.mark.parametrize("wrong", WRONG_JSON)
def test_a_wrong_json_of_a_remote_index_is_not_believed(corpus, tmp_path, expected, caplog, wrong):
    def change(said, _):
        new = WRONG_JSON[wrong]
        said.write_bytes(new if isinstance(new, bytes) else json.dumps(json.loads(said.read_text()) | new).encode())

    index = remote(corpus, tmp_path, change)
    assert np.array_equal(index.records(), expected)
    assert "00000.tar is damaged: the shard is fetched, and indexed here" in caplog.text


@pytest.mark.parametrize("how", ["cut", "empty", "foreign", "absurd"])
def test_damaged_records_of_a_remote_index_are_not_believed(corpus, tmp_path, expected, caplog, how):
    index = remote(corpus, tmp_path, lambda _, records: damaged(records, how))
    assert np.array_equal(index.records(), expected) and "is damaged" in caplog.text


@pytest.mark.parametrize(("part", "values"), [
    ("offset", [-512, 2**62]), ("size", [-5, 2**62]), ("size", [10**7]), ("offset", [10**7]),
])  # fmt: skip
@pytest.mark.parametrize("member", ["image", "caption", "metadata"])
def test_records_that_point_out_of_the_tar_are_not_believed(corpus, tmp_path, expected, caplog, member, part, values):
    def change(_, file):
        records = np.load(file)
        for row, value in enumerate(values):
            records[member][part][row] = value
        np.save(file, records)

    index = remote(corpus, tmp_path, change)
    assert np.array_equal(index.records(), expected) and "is damaged" in caplog.text


def test_records_that_vanish_before_they_are_read_are_made_anew(corpus, tmp_path, expected, caplog, monkeypatch):
    holds, looked = indexing._holds_records, []

    def vanish_once(path, count):
        found = holds(path, count)
        if found and not looked:
            looked.append(path)
            Path(path).unlink()
        return found

    monkeypatch.setattr(indexing, "_holds_records", vanish_once)
    made = remote(corpus, tmp_path, lambda *_: None)
    assert looked and np.array_equal(made.records(), expected) and "is damaged" in caplog.text


def test_a_good_remote_index_spares_the_shard_and_bad_hashes_are_left_out(corpus, tmp_path, expected, caplog):
    index = remote(corpus, tmp_path, lambda *_: damaged(corpus / "00000.tar.index.hashes.npy", "cut"))
    assert np.array_equal(index.records(), expected) and not index.is_hashed
    assert not caplog.records and not (tmp_path / "cache" / "shards").exists()


def test_a_damaged_remote_index_is_never_left_to_the_next_start(corpus, tmp_path):
    def change(_, file):
        records = np.load(file)
        records["image"]["offset"] = -1
        np.save(file, records)
        (corpus / "00000.tar").unlink()  # nor can the shard be had

    for _ in range(2):
        with pytest.raises(ShardMissing):
            remote(corpus, tmp_path, change)
        write_tar(corpus / "00000.tar", sample("a", encode(textured(0))))


def test_an_index_that_lies_gives_a_bad_sample(corpus, tmp_path):
    """Where the files of the cache are whole, and wrong."""
    samples = ShardSamples(str(corpus), 64, cache_dir=tmp_path / "cache")
    file = f"{samples.indexed.indexes[0].stem}.npy"
    records = np.load(file)
    for row, (offset, size) in enumerate([(-512, 10), (0, 2**62), (2**62, 10), (0, -5)]):
        records["image"][row] = (offset, size)
    np.save(file, records)
    samples = ShardSamples(str(corpus), 64, cache_dir=tmp_path / "cache")
    for row in range(4):
        with pytest.raises(BadSample, match="shard ends before what its index names"):
            samples.get(row)
    assert len(find_pictures(samples, "exact", 1).positions) == (SHARDS - 1) * ROWS


def test_a_shard_that_is_gone_before_it_is_hashed_has_no_known_duplicates(corpus, tmp_path, caplog):
    samples = ShardSamples(str(corpus), 64, cache_dir=tmp_path / "cache")
    shutil.copy(corpus / "00002.tar", tmp_path / "put aside.tar")
    os.unlink(corpus / "00002.tar")
    found = find_pictures(samples, "near", 1)
    gone = set(range(2 * ROWS, 3 * ROWS))
    assert set(found.positions.tolist()) == set(range(SHARDS * ROWS)) - gone
    assert "duplicates in" in caplog.text and "00002.tar are not known" in caplog.text
    shutil.copy(tmp_path / "put aside.tar", corpus / "00002.tar")
    again = ShardSamples(str(corpus), 64, cache_dir=tmp_path / "cache")
    assert len(find_pictures(again, "near", 1).positions) == SHARDS * ROWS


def test_arrays_that_are_none_are_read_as_none(tmp_path):
    begun = b"\x93NUMPY\x01\x00"
    for number, data in enumerate([b"", b"PK\x03\x04", begun, begun + b"\x04\x00{'a\n", b"text"]):
        (tmp_path / f"{number}.npy").write_bytes(data)
        assert read_array(tmp_path / f"{number}.npy") is None
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", a=np.zeros(1))
    assert read_array(tmp_path / "objects.npy") is None and read_array(tmp_path / "archive.npz") is None
