"""Lists of very many samples: what is kept of them lies in files that all processes map, and is the same."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memtrain.data import datamodule as datamodule_
from memtrain.data import excluded_keys, find_pictures
from memtrain.data.kept import once
from memtrain.data.names import as_names, by_shard, places
from memtrain.data.pictures import Pictures
from tests.conftest import build_data


@pytest.fixture
def few_are_many(monkeypatch):
    """What is small in tests is kept as what is large."""
    for module in (excluded_keys, find_pictures, datamodule_):
        monkeypatch.setattr(module, "MANY", 1)


def rows(data, steps=30) -> list[list[int]]:
    batches = data.order.global_batches(4, 0, lambda shards: None)
    return [next(batches).tolist() for _ in range(steps)]


def mapped(*arrays) -> bool:
    return all(isinstance(values, np.memmap) for values in arrays)


@pytest.fixture
def lists(corpus, tmp_path):
    """Excluded keys, one of them unknown, and groups of duplicates, as options of `from_shards`."""
    names = [build_data(corpus).samples.key(position) for position in range(48)]
    excluded, groups = tmp_path / "excluded.txt", tmp_path / "groups.parquet"
    excluded.write_text("\n".join([*names[3:40:7], "00009.tar/gone", names[3]]))
    members = [1, 5, 20, 30, 2, 40, 45]
    pq.write_table(pa.table({"group": [0, 0, 0, 0, 1, 1, 1], "key": [names[m] for m in members]}), groups)
    return dict(exclude_keys=str(excluded), repeats_from=str(groups), max_visits_per_group=2, canaries=0)


@pytest.mark.parametrize("more", [{}, {"where": "size > 40"}], ids=["all", "some"])
def test_a_corpus_of_long_lists_is_that_of_short_ones(corpus, lists, few_are_many, monkeypatch, tmp_path, more):
    options = lists | more | dict(repeats=None)
    for cache in ("made", "made", "cold"):  # the second finds what the first has kept
        kept = build_data(corpus, cache_dir=str(tmp_path / cache), **options)
        pictures, limited = kept.groups.pictures, kept.order.limited
        assert mapped(pictures.positions, pictures.first, limited.visits, limited.positions)
        assert mapped(*(rows for rows in kept.samples.rows.excluded.values() if len(rows)))
    with monkeypatch.context() as patch:
        for module in (excluded_keys, find_pictures, datamodule_):
            patch.setattr(module, "MANY", 10**9)
        plain = build_data(corpus, cache_dir=str(tmp_path / "plain"), **options)
    assert rows(kept) == rows(plain) and np.array_equal(kept.samples.counts, plain.samples.counts)
    every = np.arange(len(plain.samples))
    assert np.array_equal(kept.groups.pictures.copies(every), plain.groups.pictures.copies(every))
    assert [kept.samples.key(at) for at in every] == [plain.samples.key(at) for at in every]
    assert len(plain.samples) == 48 - 6 or more


def test_what_a_list_is_made_of_names_its_files(corpus, lists, few_are_many, tmp_path, caplog):
    """A list that has changed is read anew, and said to be what it is, found or made."""
    caplog.set_level(logging.INFO, "memtrain")
    options = dict(exclude_keys=lists["exclude_keys"], cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        caplog.clear()
        assert len(build_data(corpus, **options).samples) == 42
        assert (
            "drops 6 samples" in caplog.text
            and "1 of its 7 keys are not in data.shards, such as 00009.tar/gone" in caplog.text
        )
    with open(lists["exclude_keys"], "a") as file:
        file.write("\n00000.tar/000000000\n")
    assert len(build_data(corpus, **options).samples) in (41, 42)
    (tmp_path / "none.txt").write_text("00009.tar/gone")
    with pytest.raises(ValueError, match=r"none of its 1 keys, such as 00009\.tar/gone"):
        build_data(corpus, **(options | dict(exclude_keys=str(tmp_path / "none.txt"))))


def test_exact_duplicates_are_found_without_holding_all_hashes(corpus, monkeypatch, tmp_path):
    """By digests alone, and by all that hashes say: the same groups."""
    for name in ("near", "exact"):
        found = build_data(corpus, cache_dir=str(tmp_path), duplicates=name).groups.pictures
        monkeypatch.setattr(find_pictures, "NEAR_AT_MOST", 1)  # too many to look for near ones
        only = build_data(corpus, cache_dir=str(tmp_path / f"only-{name}"), duplicates=name).groups.pictures
        monkeypatch.setattr(find_pictures, "NEAR_AT_MOST", 500_000)
        if name == "exact":
            assert np.array_equal(only.positions, found.positions) and np.array_equal(only.first, found.first)


def test_names_are_found_as_one_by_one():
    keys = np.array([b"b", b"aa", b"c.tar/d", b"\xff"], dtype=np.bytes_)
    assert places(np.array([b"aa", b"zz", b"\xff", b"b", b"aa"]), keys).tolist() == [1, -1, 3, 0, 1]
    assert places(np.array([b"a"]), keys[:0]).tolist() == [-1]
    texts = ["x/0.tar/b", "1.tar/b", "x/0.tar/c\nd", "no shard", "1.tar/\udcff", "1.tar/2.tar/e"]
    found = {home: (which.tolist(), after.tolist()) for home, which, after in by_shard(as_names(texts))}
    assert found == {
        "x/0.tar": ([0, 2], [b"b", b"c\nd"]),
        "1.tar": ([1, 4], [b"b", b"\xff"]),
        "1.tar/2.tar": ([5], [b"e"]),
    }
    assert found.keys() == {name.rsplit(".tar/", 1)[0] + ".tar" for name in texts if ".tar/" in name}


def test_the_largest_groups_come_first_but_for_those_that_are_named():
    pictures = Pictures.labelled(np.arange(12), np.array([0, 1, 0, 1, 2, 2, 2, 3, 3, 4, 4, 5]))
    whole = [group.tolist() for group in pictures.groups(10)]
    assert whole == [[4, 5, 6], [0, 2], [1, 3], [7, 8], [9, 10]]
    for most in range(6):
        assert [group.tolist() for group in pictures.groups(most)] == whole[:most]
        named = [group.tolist() for group in pictures.groups(most, ahead=np.array([9, 4]))]
        assert named == [[4, 5, 6], [9, 10], [0, 2], [1, 3], [7, 8]][:most]


def test_what_is_kept_once_is_made_once_and_again_where_it_is_damaged(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"one": np.arange(3), "two": np.zeros((0, 2))}

    for _ in range(2):
        found = once(tmp_path, "said", make)
        assert found["one"].tolist() == [0, 1, 2] and found["two"].shape == (0, 2)
    assert len(made) == 1
    [file] = tmp_path.glob("*.one.npy")
    file.write_bytes(file.read_bytes()[:-3])
    assert once(tmp_path, "said", make)["one"].tolist() == [0, 1, 2] and len(made) == 2
    once(tmp_path, "said otherwise", make)
    assert len(made) == 3
