"""`data.exclude_keys`: who is on the list is gone, everything else stays what it was."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memtrain.data.batches import BatchDecoder
from memtrain.data.latents import LatentCache
from memtrain.data.samples import ShardSamples
from memtrain.training.latent_cache import made_with, write_latents
from tests.conftest import build_data, build_module
from tests.support.tars import picture, sample, write_tar


def names(samples: ShardSamples) -> list[str]:
    return [samples.key(index) for index in range(len(samples))]


def write_list(path, keys, column="key") -> str:
    pq.write_table(pa.table({column: keys, "evidence": np.zeros(len(keys))}), path)
    return str(path)


@pytest.mark.parametrize("where", [None, "size > 40"])
def test_who_is_on_the_list_is_gone_and_the_rest_unchanged(corpus, tmp_path, caplog, where):
    caplog.set_level(logging.INFO, "memtrain")
    whole = ShardSamples(str(corpus), 64, where=where)
    every = names(whole)
    gone = [every[i] for i in (0, 1, 5, len(every) - 1)]  # two that follow one another, the first and the last
    left = ShardSamples(str(corpus), 64, where=where, exclude_keys=write_list(tmp_path / "list.parquet", gone))
    assert names(left) == [name for name in every if name not in gone]
    assert len(left) == len(whole) - 4 == sum(left.counts) and "data.exclude_keys drops 4 samples" in caplog.text
    assert np.array_equal(left.find(names(left)), np.arange(len(left)))
    with pytest.raises(ValueError, match=r"no sample 00000\.tar"):
        left.find(gone[:1])
    for index in range(0, len(left), 7):
        ours, theirs = left.get(index), whole.get(int(whole.find([left.key(index)])[0]))
        assert np.array_equal(ours[0], theirs[0]) and ours[1] == theirs[1]


def test_what_was_cached_serves_the_rest(pipeline_folder, corpus, tmp_path):
    """The same cache, without encoding anything again."""
    whole, model = ShardSamples(str(corpus), 64), build_module(pipeline_folder).model
    write_latents(
        model, whole, range(3), str(tmp_path / "cache"),
        dtype="float32", flip=False, batch_size=16, num_workers=0, device="cpu", progress=False,
    )  # fmt: skip
    left = ShardSamples(str(corpus), 64, exclude_keys=write_list(tmp_path / "list.parquet", names(whole)[3:20:4]))
    ours, theirs = (LatentCache(str(tmp_path / "cache"), samples, "center", False) for samples in (left, whole))
    for cache, samples in ((ours, left), (theirs, whole)):
        cache.check(made_with(model, samples))
    for index in range(len(left)):
        one, other = ours.get(index, False), theirs.get(int(whole.find([left.key(index)])[0]), False)
        assert one.caption == other.caption and one.columns.keys() == other.columns.keys()
        assert all(np.array_equal(values, other.columns[name]) for name, values in one.columns.items())


def test_buckets_stay_those_of_their_samples(tmp_path):
    shapes = [(64, 64), (96, 48), (48, 96), (96, 48), (64, 64)]
    members = [
        member
        for key, (width, height) in zip("abcde", shapes, strict=True)
        for member in ((f"{key}.jpg", picture(size=(width, height))), (f"{key}.txt", key.encode()))
    ]
    write_tar(tmp_path / "x.tar", members)
    options = dict(max_aspect_ratio=2.0, bucket_multiple=16, canaries=0, reference=0)
    whole = build_data(tmp_path, 1, **options)
    left = build_data(tmp_path, 1, exclude_keys=write_list(tmp_path / "list.parquet", ["x.tar/b"]), **options)
    sizes = [whole.samples.size_of(index) for index in (0, 2, 3, 4)]
    assert [left.samples.size_of(index) for index in range(4)] == sizes and len(set(sizes)) == 3
    assert [left.samples.sizes[bucket] for bucket in left.samples.buckets(0)] == sizes
    decode = BatchDecoder(left.samples, left.groups, left.views)
    assert [decode([(0, 0, index)]).captions[0] for index in range(4)] == list("acde")
    assert left.order.rows_of_bucket.total() == 4


def test_a_text_file_is_a_list_too(tmp_path, caplog):
    names_of = ["é", "a b", "\udcff", "c"]
    write_tar(tmp_path / "x.tar", [member for name in names_of for member in sample(name)])
    listed = tmp_path / "list.txt"
    listed.write_text("x.tar/é\n\n x.tar/a b \nx.tar/\\udcff\nx.tar/gone\ny.tar/c\n", encoding="utf-8")
    left = ShardSamples(str(tmp_path), 16, exclude_keys=str(listed))
    assert names(left) == ["x.tar/c"]
    assert "2 of its 5 keys are not in data.shards, such as x.tar/gone" in caplog.text


def test_an_empty_list_changes_nothing(corpus, tmp_path):
    path = write_list(tmp_path / "list.parquet", pa.array([], pa.string()))
    assert names(ShardSamples(str(corpus), 64, exclude_keys=path)) == names(ShardSamples(str(corpus), 64))


def test_wrong_lists_are_named(corpus, tmp_path):
    every = names(ShardSamples(str(corpus), 64))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    for path, says in (
        (str(tmp_path / "none.parquet"), "no such file.*memtrain ledger suspects"),
        (str(tmp_path / "none.txt"), "no such file"),
        (str(tmp_path / "broken.parquet"), "cannot be read"),
        (write_list(tmp_path / "other.parquet", every, column="sample"), "it has no column key"),
        (
            write_list(tmp_path / "alien.parquet", ["else.tar/1"]),
            "none of its 1 keys, such as else.tar/1.*another corpus",
        ),
        (write_list(tmp_path / "all.parquet", every), "leaves no sample to train on"),
    ):
        with pytest.raises(ValueError, match=rf"data\.exclude_keys=.*{says}"):
            ShardSamples(str(corpus), 64, exclude_keys=path)
