"""Copies are found across shards, near copies by PDQ; what only looks empty alike is not."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from memtrain.cli.shards import shards
from memtrain.data.covering import MIRRORED
from memtrain.data.duplicates import COLUMNS
from memtrain.data.hashes import MIN_QUALITY, perceptual_hash
from memtrain.data.samples import ShardSamples
from tests.support.audits import duplicates_in
from tests.support.corpora import corpus_with_every_fault, encode, flat, sample, textured, write_tar


def groups_of(*folders: Path, **options) -> dict[frozenset[str], str]:
    """Kind of each group, by its samples' keys."""
    groups: dict[int, list[dict]] = {}
    for row in duplicates_in(*folders, **options)[1].to_pylist():
        groups.setdefault(row["group"], []).append(row)
    assert list(groups) == list(range(len(groups)))
    assert [len(rows) for rows in groups.values()] == sorted(map(len, groups.values()), reverse=True)
    return {frozenset(row["key"] for row in rows): rows[0]["kind"] for rows in groups.values()}


def test_copies_are_found_across_shards_and_folders_under_the_readers_keys(tmp_path):
    copy = encode(textured(0))
    other = sample("000000001", encode(textured(1)))
    write_tar(tmp_path / "one/00000.tar", [*sample("000000000", copy), *other])
    write_tar(tmp_path / "one/00001.tar", sample("000010000", copy))
    write_tar(tmp_path / "two/00000.tar", sample("000000000", copy, json_bytes=b"{}"))  # the bytes are hashed
    folders = [tmp_path / "one", tmp_path / "two"]
    keys = {"one/00000.tar/000000000", "one/00001.tar/000010000", "two/00000.tar/000000000"}
    assert groups_of(*folders) == {frozenset(keys): "exact"}
    samples = ShardSamples(list(map(str, folders)), 16, cache_dir=tmp_path / "cache")
    assert keys < {samples.key(index) for index in range(len(samples))}


def test_near_copies_are_found_and_different_pictures_are_not(tmp_path):
    members = []
    for seed in range(12):
        members += sample(f"{seed:09d}", encode(textured(seed, (320, 240)), quality=95))
    again = textured(3, (320, 240))
    members += sample("q60", encode(again, quality=60))
    members += sample("half", encode(again.resize((160, 120), Image.Resampling.LANCZOS), quality=80))
    members += sample("png", encode(again.resize((400, 300), Image.Resampling.BICUBIC), "PNG"), ext="png")
    members += sample("mirrored", encode(ImageOps.mirror(again), quality=80))
    members += sample("upside", encode(ImageOps.flip(again), quality=95))
    members += sample("copy", encode(textured(5, (320, 240)), quality=95))
    write_tar(tmp_path / "x.tar", members)
    near = frozenset(f"x.tar/{key}" for key in ("000000003", "q60", "half", "png", "mirrored"))
    exact = frozenset(f"x.tar/{key}" for key in ("000000005", "copy"))
    assert groups_of(tmp_path) == {near: "near", exact: "exact"}
    assert exact in groups_of(tmp_path, distance=0)


def test_the_hash_of_a_mirror_image_is_known_from_that_of_the_picture():
    for seed in range(8):
        image = textured(seed, (320, 240))
        told, seen = (
            np.frombuffer(perceptual_hash(encode(one, "PNG"))[0], np.uint64) for one in (image, ImageOps.mirror(image))
        )
        assert np.bitwise_count(told ^ MIRRORED ^ seen).sum() <= 16
        assert np.bitwise_count(told ^ seen).sum() > 64


def test_a_near_group_takes_its_exact_copies_in(tmp_path):
    image = textured(0, (320, 240))
    copy = encode(image, quality=95)
    write_tar(tmp_path / "x.tar", [*sample("a", copy), *sample("b", encode(image, quality=60)), *sample("c", copy)])
    assert groups_of(tmp_path) == {frozenset(f"x.tar/{key}" for key in "abc"): "near"}


def test_flat_pictures_are_alike_only_where_they_are_equal(tmp_path):
    members = [m for n in range(6) for m in sample(f"{n}", encode(flat((40 * n, 20, 200 - 30 * n))))]
    members += sample("copy", encode(flat((0, 20, 200))))
    write_tar(tmp_path / "x.tar", members)
    assert all(perceptual_hash(data)[1] < MIN_QUALITY for name, data in members if name.endswith("jpg"))
    assert groups_of(tmp_path) == {frozenset({"x.tar/0", "x.tar/copy"}): "exact"}


@pytest.mark.parametrize("size", [(1, 1), (4, 300), (300, 4), (5, 5), (63, 64)])
def test_a_picture_of_any_size_has_a_hash(size):
    pdq, quality = perceptual_hash(encode(textured(0, size)))
    assert len(pdq) == 32 and 0 <= quality <= 100


def test_bad_samples_cost_their_neighbours_nothing(tmp_path):
    corpus = corpus_with_every_fault(tmp_path)
    found, table = duplicates_in(tmp_path)
    unreadable = {planted.name for planted in corpus.faults if planted.kind == "unreadable_image"}
    assert {name for name, _ in found.some_unreadable} == unreadable and found.num_samples == len(corpus.captions)
    assert set(table["key"].to_pylist()) == {
        "00003.tar/000030000",
        "00003.tar/000030002",
        "00004.tar/000040001",
    }


@pytest.mark.usefixtures("spawned_by_forks")
def test_processes_find_what_one_finds(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", sample("a", encode(textured(0))))
    wanted = {frozenset({"0.tar/a", "1.tar/a"}): "exact"}
    assert groups_of(tmp_path, workers=2) == groups_of(tmp_path) == wanted


def test_the_parquet_and_the_summary(tmp_path, capsys):
    members = []
    for number in range(60):
        pair = number // 2
        members += sample(f"{number}", encode(textured(pair)), f"pair {pair}")
    members += sample("third", encode(textured(0)), "evil \x1b[2J caption")
    write_tar(tmp_path / "x.tar", members)
    argv = ["duplicates", str(tmp_path), "--workers=1", f"--out={tmp_path}/groups.parquet"]
    shards(argv)
    out = capsys.readouterr().out
    table = pq.read_table(tmp_path / "groups.parquet")
    assert table.schema == COLUMNS
    first = table.slice(0, 3).to_pylist()
    assert [row["key"] for row in first] == ["x.tar/0", "x.tar/1", "x.tar/third"]
    assert {(row["group"], row["kind"]) for row in first} == {(0, "exact")}
    assert all(len(row["sha256"]) == len(row["pdq"]) == 64 for row in first)
    assert first[2]["caption"] == "evil \x1b[2J caption" and "\x1b" not in out
    assert "30 groups with 61 of 61 samples" in out and "  3 exact  pair 0\n" in out
    assert "… and 10 more" in out
    with pytest.raises(ValueError, match="is there already"):
        shards(argv)


def test_no_duplicates_is_an_empty_table(tmp_path, capsys):
    write_tar(tmp_path / "x.tar", sample("a", encode(textured(0))))
    (tmp_path / "y.tar").write_bytes(b"")
    shards(["duplicates", str(tmp_path), "--workers=1", f"--out={tmp_path}/groups.parquet"])
    assert "0 groups with 0 of 1 samples" in capsys.readouterr().out
    assert len(pq.read_table(tmp_path / "groups.parquet")) == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--distance=48"], "--distance must be from 0 to 47 bits, got 48"),
        (["--distance=-1"], "got -1"),
        (["--out={folder}/none/x.parquet"], "no folder"),
        (["--workers=0"], "workers must be >= 1"),
    ],
)
def test_what_the_user_can_mend_is_one_line(tmp_path, argv, says):
    write_tar(tmp_path / "x.tar", sample("a", encode(textured(0))))
    given = [part.format(folder=tmp_path) for part in argv]
    with pytest.raises(ValueError, match=says):
        shards(["duplicates", str(tmp_path), f"--out={tmp_path}/x.parquet", *given])
    assert not (tmp_path / "x.parquet").exists()
