"""Corpora on disk and behind URLs: filters, weights, captions, shards that change or vanish."""

import json
import logging

import numpy as np
import pytest

from memtrain.data import open_shards
from memtrain.data.batches import BatchDecoder
from memtrain.data.buckets import bucket_sizes, nearest_bucket
from memtrain.data.datamodule import from_shards
from memtrain.data.images import BadSample
from memtrain.data.index import open_index, write_index
from memtrain.data.remote import ShardMissing
from memtrain.data.row_filter import parse_filter
from memtrain.data.samples import ShardSamples
from memtrain.data.sources import find_sources
from memtrain.data.view import View
from tests.support.tars import picture, sample, write_tar


def with_json(key: str, row: dict | str) -> list[tuple[str, bytes]]:
    text = row if isinstance(row, str) else json.dumps(row)
    return [(f"{key}.jpg", picture()), (f"{key}.txt", key.encode()), (f"{key}.json", text.encode())]


def keys(samples: ShardSamples) -> list[str]:
    return [samples.key(index) for index in range(len(samples))]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(open_shards, "_BACKOFF_S", 0.0)


# ---- filters


ROWS = {
    "a": {"punsafe": 0.01, "similarity": 0.35, "NSFW": "UNLIKELY"},
    "b": {"punsafe": 0.5, "similarity": 0.35, "NSFW": "UNLIKELY"},
    "c": '{"punsafe": NaN, "similarity": 0.35, "NSFW": "UNLIKELY"}',
    "d": {"punsafe": None, "similarity": 0.9, "NSFW": "NSFW"},
    "e": {"punsafe": 0.02, "similarity": 0.2, "NSFW": "NSFW"},
    "f": "{broken",
    "g": {"punsafe": 0, "similarity": 1, "NSFW": None},
}


@pytest.mark.parametrize(
    ("where", "left", "dropped"),
    [
        ("punsafe < 0.1 and similarity > 0.3", "ag", [4, 1]),
        ("NSFW == 'UNLIKELY'", "abc", [4]),
        ("NSFW in ['NSFW', 'x'] or similarity >= 1", "deg", [4]),
        ("NSFW not in ['NSFW']", "abc", [4]),
        ("not punsafe < 0.1", "b", [6]),
        ("0.3 < similarity < 0.5", "abc", [4]),
    ],
)
def test_a_filter_keeps_what_it_says_and_counts_what_it_drops(tmp_path, where, left, dropped, caplog):
    write_tar(tmp_path / "x.tar", [member for key, row in ROWS.items() for member in with_json(key, row)])
    caplog.set_level(logging.INFO, "memtrain")
    for _ in range(2):  # the second time from the cache folder
        samples = ShardSamples(str(tmp_path), 16, where=where, cache_dir=tmp_path / "cache")
        samples.log_counts()
        assert keys(samples) == [f"x.tar/{key}" for key in left]
        assert [samples.get(index)[1] for index in range(len(samples))] == list(left)
        assert list(samples.rows.filtered.dropped.values()) == dropped
    for clause, number in zip(parse_filter(where), dropped, strict=True):
        assert f"drops {number} samples: {clause.text}" in caplog.text


def test_a_filter_reads_the_parquet_as_the_json(corpus, tmp_path):
    where = "size > 40 and background in ['red', 'teal', 'white', 'blue']"
    from_parquet = ShardSamples(str(corpus), 64, where=where, cache_dir=tmp_path / "one")
    bare = tmp_path / "bare"
    bare.mkdir()
    for tar in corpus.glob("*.tar"):
        (bare / tar.name).write_bytes(tar.read_bytes())
    from_json = ShardSamples(str(bare), 64, where=where, cache_dir=tmp_path / "two")
    assert keys(from_parquet) == keys(from_json) and 0 < len(from_json) < 48
    assert from_parquet.rows.filtered.dropped == from_json.rows.filtered.dropped


@pytest.mark.parametrize(
    "where", ["__import__('os').remove('x')", "punsafe <", "3", "f(x) < 1", "x.y < 1", "punsafe < other()", "x = 1"]
)
def test_a_filter_is_never_code(where):
    with pytest.raises(ValueError, match=r"data\.where=.*write comparisons"):
        parse_filter(where)


def test_a_filter_that_fits_nothing_is_named(tmp_path):
    write_tar(tmp_path / "x.tar", with_json("a", ROWS["a"]))
    with pytest.raises(ValueError, match="drops every sample"):
        ShardSamples(str(tmp_path), 16, where="nothing > 1")
    with pytest.raises(ValueError, match="does not fit the column's values"):
        ShardSamples(str(tmp_path), 16, where="NSFW < 1")


# ---- captions


def test_one_of_several_captions_is_drawn(tmp_path):
    row = {"all_captions": ["one", " two ", 3, "three"], "top_caption": "top"}
    write_tar(tmp_path / "x.tar", [*with_json("a", row), *with_json("b", {}), *with_json("c", {"top_caption": None})])
    many = ShardSamples(str(tmp_path), 16, caption="all_captions")
    assert [many.get(0, View(caption=share))[1] for share in (0, 0.34, 0.99)] == ["one", "two", "three"]
    assert many.get(1)[1] == ""  # no such column: no caption, and no crash
    single = ShardSamples(str(tmp_path), 16, caption="top_caption")
    assert [single.get(i)[1] for i in range(3)] == ["top", "", ""]


def test_views_depend_on_step_and_place_alone(tmp_path):
    write_tar(tmp_path / "x.tar", sample("a", image=picture(size=(64, 32))))
    data = from_shards(str(tmp_path), 16, 1, 0, seed=5, canaries=0, repeats=1, reference=0, crop="random", flip=0.5)
    views = [data.views.view(step, place) for step in range(20) for place in range(20)]
    assert len({view.crop for view in views}) == 400 and 150 < sum(view.flip for view in views) < 250
    assert data.views.view(3, 4) == views[64]
    with pytest.raises(ValueError, match=r"data\.crop must be center or random, got centre"):
        from_shards(str(tmp_path), 16, 1, 0, seed=5, canaries=0, repeats=1, reference=0, crop="centre")


# ---- sources


def test_sources_have_weights(tmp_path):
    for name in ("laion", "mine"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "00000.tar", sample("000000000", name))
    spec = [str(tmp_path / "laion"), {"shards": str(tmp_path / "mine"), "weight": 3}]
    assert [(shard.name, shard.weight) for shard in find_sources(spec)] == [
        ("laion/00000.tar", 1.0),
        ("mine/00000.tar", 3.0),
    ]
    data = from_shards(spec, 16, 1, 0, seed=0, canaries=0, repeats=1, reference=0)
    assert len(data.order) == 4


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"shards": "x", "weight": 0}, "weight must be a number above 0, got 0"),
        ({"shards": "x", "weight": float("nan")}, "above 0"),
        ({"shard": "x"}, "has the keys shards and weight, got shard"),
        (["https://e.org/{0..1}.tar", "https://e.org/0.tar"], "twice"),
    ],
)
def test_wrong_sources_are_named(spec, says):
    with pytest.raises(ValueError, match=says):
        find_sources(spec)


def test_names_of_remote_shards_hold_no_secrets():
    shards = find_sources(["https://u:p@h.org/a/{00000..00001}.tar?sig=s", "pipe:aws s3 cp s3://b/c/00000.tar -"])
    assert len(shards) == 3 and not any(secret in shard.name for shard in shards for secret in ("sig", "u:p"))


def test_a_remote_corpus_is_the_local_one(corpus, tmp_path):
    local = ShardSamples(str(corpus), 64)
    urls = [f"pipe:cat '{tar}'" for tar in sorted(corpus.glob("*.tar"))]
    remote = ShardSamples(urls, 64, cache_dir=tmp_path / "cache")
    assert len(remote) == len(local)
    for index in (0, 17, 47):
        one, other = local.get(index), remote.get(index)
        assert np.array_equal(one.image, other.image) and one[1:] == other[1:]
    again = ShardSamples(urls, 64, cache_dir=tmp_path / "cache", where="size > 40")
    assert 0 < len(again) < len(local)


# ---- indexes


def test_an_index_is_written_once_and_read_from_beside_or_cache(tmp_path):
    cache = tmp_path / "cache"
    tar = write_tar(tmp_path / "x.tar", [*sample("a"), ("c.jpg", picture())])
    assert open_index(tar, cache) is None
    ShardSamples(str(tmp_path), 16, cache_dir=cache)
    assert not list(tmp_path.glob("*.index.*"))  # training writes nothing among the user's data
    assert open_index(tar, cache).samples == 1 and open_index(tar, cache).skipped() == [("c", "no caption")]
    write_index(tar)
    assert open_index(tar, tmp_path / "nowhere").stem == str(tmp_path / "x.tar.index")


def test_an_outdated_index_is_written_anew(tmp_path):
    tar = write_tar(tmp_path / "x.tar", sample("a"))
    write_index(tar)
    write_tar(tar, sample("a") + sample("b"))
    assert keys(ShardSamples(str(tmp_path), 16)) == ["x.tar/a", "x.tar/b"]


def test_keys_of_any_bytes_come_back(tmp_path):
    names = ["é", "a b", "x" * 90, "\udcff"]
    write_tar(tmp_path / "x.tar", [member for name in names for member in sample(name)])
    assert keys(ShardSamples(str(tmp_path), 16)) == [f"x.tar/{name}" for name in names]


# ---- shards that change or vanish while they are read


def test_a_shard_that_is_replaced_gives_no_foreign_pictures(tmp_path):
    tar = write_tar(tmp_path / "x.tar", sample("a", "first"))
    samples = ShardSamples(str(tmp_path), 16)
    write_tar(tar, sample("b", "other"))
    with pytest.raises(BadSample, match="changed since it was indexed"):
        samples.get(0)


def test_a_shard_that_vanishes_stops_the_run_or_is_skipped(tmp_path, caplog, quick):
    for name in "xy":
        write_tar(tmp_path / f"{name}.tar", sample("a", name))
    options = dict(seed=0, canaries=0, repeats=1, reference=0)
    strict = from_shards(str(tmp_path), 16, 1, 0, **options)
    lenient = from_shards(str(tmp_path), 16, 1, 0, missing_shards="skip", **options)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(ShardMissing, match=r"x\.tar cannot be opened.*put it back and resume"):
        strict.decode([0, 1])
    assert sum("try" in record.message for record in caplog.records) == 3
    batch = lenient.decode([0, 1])
    assert batch.valid.tolist() == [False, True] and batch.captions == ["", "y"]
    assert batch.problems == [("x.tar/a", "shard is missing")]


def test_too_many_bad_samples_stop_the_run(tmp_path):
    write_tar(tmp_path / "x.tar", sample("a"))
    data = from_shards(str(tmp_path), 16, 1, 0, seed=0, canaries=0, repeats=1, reference=0, max_bad_fraction=0.1)
    data.problems = {"x.tar/b": "image cannot be decoded (X)"}
    data.check_bad(100, 150)  # too few to say
    data.check_bad(20, 200)
    with pytest.raises(ValueError, match=r"21 of 200 samples.*max_bad_fraction=0\.1.*1 image cannot be decoded"):
        data.check_bad(21, 200)


# ---- aspect-ratio buckets


def test_buckets_have_the_area_of_the_square():
    sizes = bucket_sizes(512, 2.0, 64)
    assert sizes[0] == (512, 512) and (384, 640) in sizes and (640, 384) in sizes
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and 0.75 * 512**2 <= height * width <= 512**2
        assert max(height / width, width / height) <= 2
    assert bucket_sizes(512, 1.0, 64) == [(512, 512)]
    assert nearest_bucket(np.array([100, 100, 160]), np.array([100, 160, 100]), sizes).tolist() == [
        0, sizes.index((384, 640)), sizes.index((640, 384)),
    ]  # fmt: skip


@pytest.mark.parametrize("has_columns", [True, False])
def test_a_sample_is_decoded_in_its_bucket(tmp_path, has_columns):
    shapes = {"a": (64, 64), "b": (96, 48), "c": (48, 96), "d": (60, 64)}
    members = []
    for key, (width, height) in shapes.items():
        row = {"width": width, "height": height} if has_columns else {}
        members += [(f"{key}.jpg", picture(size=(width, height))), *with_json(key, row)[1:]]
    write_tar(tmp_path / "x.tar", [*members, ("e.jpg", b"<html>"), ("e.txt", b"")])
    data = from_shards(
        str(tmp_path), 64, 1, 0, seed=0, canaries=0, repeats=1, reference=0, max_aspect_ratio=2.0, bucket_multiple=16
    )
    sizes = [data.samples.size_of(index) for index in range(5)]
    assert sizes[0] == sizes[3] == sizes[4] == (64, 64)
    assert sizes[1][1] > sizes[1][0] and sizes[2][0] > sizes[2][1]
    decode = BatchDecoder(data.samples, data.groups, data.views)
    assert decode([(0, 0, 1)]).images.shape == (1, 3, *sizes[1])
    assert data.decode([0, 1, 2]).images.shape == (3, 3, 64, 64)  # canaries and reference set: squares


def test_wrong_buckets_are_named(tmp_path):
    for options in ({"max_aspect_ratio": 0.5}, {"max_aspect_ratio": 1.1}, {"bucket_multiple": 0}):
        with pytest.raises(ValueError, match=r"data\.(max_aspect_ratio|bucket_multiple)"):
            bucket_sizes(64, **{"max_aspect_ratio": 2.0, "multiple": options.pop("bucket_multiple", 64)} | options)
