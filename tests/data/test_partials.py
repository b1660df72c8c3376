"""Partial results: a stop loses nothing, two double nothing, what changes is named; and they can be read meanwhile."""

import os
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memtrain.cli.shard_audits import memory_of
from memtrain.cli.shards import shards
from memtrain.data.distribute import Local, Part
from memtrain.data.duplicate_groups import find_equal, standing
from memtrain.data.duplicates import hash_shard, hash_shards
from memtrain.data.joins import opened
from memtrain.data.near_search import search, searches
from memtrain.data.partials import make_partials, merging, open_manifest, read_manifest
from memtrain.data.recall import KINDS, measure_recall
from memtrain.data.scale import extrapolated, measure_scale
from memtrain.data.sources import LocalShard, local_shards
from tests.support.audits import MEMORY
from tests.support.corpora import encode, sample, textured, write_tar


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Three shards of four pictures; each repeats one of the shard before it."""
    for number in range(3):
        members = [m for row in range(4) for m in sample(f"{4 * number + row:09d}", encode(textured(3 * number + row)))]
        write_tar(tmp_path / "corpus" / f"{number:05d}.tar", members)
    return tmp_path / "corpus"


def duplicates(corpus: Path, out: Path, *words: str) -> None:
    shards(["duplicates", str(corpus), f"out={out}", "workers=1", "memory=1GB", *words])


def made(manifest, work, part: str = "1/1", workers: int = 1) -> dict[str, int]:
    """How many of this part's shards were read, kept, left."""
    done = list(make_partials(manifest, work, Part.parse(part), Local(workers)))
    kept = sum(one.result["kept"] for one in done if one.result)
    left = sum(one.failure is not None for one in done)
    return {"read": len(done) - kept - left, "kept": kept, "left": left}


def test_what_is_done_is_not_read_again_unless_it_changed(corpus, tmp_path):
    manifest = open_manifest(tmp_path / "m", "duplicates", "", local_shards([str(corpus)]))
    assert made(manifest, hash_shard, "2/3") == {"read": 1, "kept": 0, "left": 0}
    (tmp_path / "m" / "shards" / ".dead.parquet").write_bytes(b"half a file, of one that was killed")
    assert made(manifest, hash_shard) == {"read": 2, "kept": 1, "left": 0}
    write_tar(corpus / "00001.tar", sample("new", encode(textured(99))))
    damaged = manifest.partial(manifest.shards[2])
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert made(manifest, hash_shard) == {"read": 2, "kept": 1, "left": 0}
    # another set of shards on the same manifest: what they have in common is kept
    larger = open_manifest(tmp_path / "m", "duplicates", "", local_shards([str(corpus / "{00000..00001}.tar")]))
    assert made(larger, hash_shard) == {"read": 0, "kept": 2, "left": 0}
    assert read_manifest(tmp_path / "m" / "manifest.json").shards == larger.shards
    with pytest.raises(ValueError, match="is of memtrain shards duplicates"):
        open_manifest(tmp_path / "m", "check", "", larger.shards)


def test_parts_and_a_merge_make_what_one_command_makes(corpus, tmp_path, capsys):
    duplicates(corpus, tmp_path / "whole.parquet")
    whole = capsys.readouterr().out
    out, manifest = tmp_path / "parts.parquet", tmp_path / "parts.partials"
    duplicates(corpus, out, "part=1/2")
    assert "part 1/2: 8 samples in 2 shards" in capsys.readouterr().out and not out.exists()
    with pytest.raises(ValueError, match="1 of 3 shards are not done yet"):
        duplicates(corpus, out, "merge")
    shards(["report", str(manifest)])
    said = capsys.readouterr().out
    assert "2 of 3 shards are hashed: 8 samples" in said and "0 groups of exact duplicates" in said
    duplicates(corpus, out, "part=2/2")
    shards(["report", str(manifest / "manifest.json")])
    assert "2 groups of exact duplicates with 4 samples" in capsys.readouterr().out
    duplicates(corpus, out, "merge=true")
    assert capsys.readouterr().out == whole.replace("whole.parquet", "parts.parquet")
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not list(manifest.glob("merge-*")) and not list(manifest.glob(".report-*"))


def test_a_check_is_reported_while_it_runs(corpus, tmp_path, capsys):
    words = ["check", str(corpus), f"manifest={tmp_path}/m", "workers=1"]
    shards([*words, "part=1/3"])
    shards([*words, "part=2/3"])
    capsys.readouterr()
    shards(["report", f"{tmp_path}/m"])
    said = capsys.readouterr().out
    assert "2 of 3 shards are checked" in said and "00001.tar/000000004: same image as 00000.tar/000000003" in said
    shards([*words, "part=3/3"])
    shards([*words, "merge"])
    said = capsys.readouterr().out
    assert "3 shards" not in said and "00002.tar/000000008: same image as 00001.tar/000000007" in said
    with pytest.raises(ValueError, match="is no manifest"):
        shards(["report", str(corpus)])


def test_a_search_goes_on_where_it_was_stopped(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("memtrain.data.near_search._ROWS_A_TASK", 60)
    manifest = open_manifest(tmp_path / "m", "duplicates", "", local_shards([str(corpus)]))
    made(manifest, hash_shard)
    work = find_equal(manifest, 31, MEMORY, 1)
    tasks = len(searches(work, 31))
    search(work, 31, MEMORY, Local(1), lambda items, total: items, at_most=3)
    now = standing(manifest, tmp_path, MEMORY, 1)
    assert (now.searched, now.searches) == (3, tasks) and tasks > 3
    counted = []
    search(
        find_equal(manifest, 31, MEMORY, 1), 31, MEMORY, Local(1), lambda items, total: counted.append(total) or items
    )
    assert counted == [tasks - 3]
    # the shards have changed: nothing of it counts any more
    write_tar(corpus / "00001.tar", sample("new", encode(textured(99))))
    made(manifest, hash_shard)
    assert find_equal(manifest, 31, MEMORY, 1) != work and not work.exists()


def test_two_of_the_same_command_are_one_too_many(corpus, tmp_path):
    manifest = open_manifest(tmp_path / "m", "duplicates", "", local_shards([str(corpus)]))
    first = hash_shards(manifest, Part(), Local(1))
    next(first)
    with pytest.raises(ValueError, match=r"another process is at work on .*/m; .*part=1/2") as raised:
        list(hash_shards(manifest, Part(), Local(1)))
    assert "\n" not in str(raised.value)
    first.close()
    with merging(manifest), pytest.raises(ValueError, match="it joins the partial results"):
        duplicates(corpus, tmp_path / "out.parquet", f"manifest={tmp_path}/m")
    duplicates(corpus, tmp_path / "out.parquet", f"manifest={tmp_path}/m")


def _growing(until: Path, shard: LocalShard):
    """Hashes a shard, to which somebody writes meanwhile until there is a file."""
    found = hash_shard(shard)
    if not until.exists():
        with shard.path.open("ab") as file:
            file.write(bytes(512))
    return found


def test_a_shard_that_changes_while_it_is_read_is_named_and_left(corpus, tmp_path, caplog):
    manifest = open_manifest(tmp_path / "m", "duplicates", "", local_shards([str(corpus / "00000.tar")]))
    still = tmp_path / "still"
    (done,) = make_partials(manifest, partial(_growing, still), Part(), Local(1))
    assert done.failure == "00000.tar changes while it is read; wait until it is finished"
    assert not manifest.partial(manifest.shards[0]).exists()
    still.touch()
    assert made(manifest, partial(_growing, still)) == {"read": 1, "kept": 0, "left": 0}


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "memtrain", disk], capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        picture = encode(textured(0))
        rng = np.random.default_rng(0)
        for number in range(2):
            members = [m for row in range(8) for m in sample(f"{row}", picture, rng.bytes(2000).hex())]
            write_tar(tmp_path / "corpus" / f"{number}.tar", members)
        filler = disk / "filler"
        filler.write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - 40_000))
        for left in (40_000, 100_000):  # not enough for a partial result, or for the joins
            filler.write_bytes(bytes(max(0, filler.stat().st_size + 40_000 - left)))
            with pytest.raises(OSError, match="No space left on device") as raised:
                duplicates(tmp_path / "corpus", tmp_path / "out.parquet", f"manifest={disk}/m")
            assert str(raised.value.filename).startswith(str(disk))
        filler.unlink()
        duplicates(tmp_path / "corpus", tmp_path / "out.parquet", f"manifest={disk}/m")
        assert len(pq.read_table(tmp_path / "out.parquet")) == 16
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_table_that_is_gone_through_is_not_held(tmp_path):
    table = pa.table({"number": np.random.default_rng(0).integers(0, 2**63, 200_000)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=10_000)
    del table
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in opened(tmp_path / "t.parquet").iter_batches(10_000)]
    assert len(held) == 20 and held[-1] < 500_000


@pytest.mark.parametrize(("said", "size"), [("2GB", 2 * 10**9), ("1.5 GiB", 1610612736), ("600000000", 6 * 10**8)])
def test_memory_is_a_size(said, size):
    assert memory_of(said) == size


@pytest.mark.parametrize(("said", "says"), [("two", "is no size"), ("10MB", "too little"), ("2GB of it", "is no size")])
def test_what_is_no_memory_is_said(said, says):
    with pytest.raises(ValueError, match=says):
        memory_of(said)


def test_the_made_up_corpus_is_grouped_as_it_was_made(tmp_path):
    found = measure_scale(20_000, tmp_path, MEMORY + 10**8, 10**8)
    assert found.found == found.planted == 3000 and found.searched == found.searches
    assert not list(tmp_path.glob("*/"))
    hours = extrapolated([found], 400_000_000)
    assert 0 < hours["check"] < hours["duplicates"]


def test_planted_near_duplicates_are_counted_by_kind(tmp_path):
    found = measure_recall(tmp_path, 70, [], 31, Local(1), MEMORY)
    assert found.planted == dict.fromkeys(KINDS, 1)
    assert found.found["JPEG at quality 30"] == found.found["half the size"] == 1 and found.precision == 1
    assert found.found["10 % cropped"] == 0
