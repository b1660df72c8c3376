"""Which samples show the same picture, and what follows for canaries and the reference set."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memtrain.core.exclusion import CANARY, REFERENCE, SACRIFICED, TRAINED
from memtrain.data.datamodule import from_shards
from memtrain.data.find_pictures import find_pictures
from memtrain.data.groups import draw_groups
from memtrain.data.hashes import HASHES
from memtrain.data.index import open_index, write_index
from memtrain.data.pictures import NO_DUPLICATES, Pictures
from memtrain.data.samples import ShardSamples
from tests.support.corpora import encode, flat, sample, textured, write_tar

# two shards: what each sample shows; "near" is picture 0 re-encoded, at another size
SHARDS = [[0, 1, 2, 0, 3], ["near", 4, 1, 5, 6, 0]]
SAME = {0: 0, 3: 0, 5: 0, 10: 0, 1: 1, 7: 1}  # position -> first position of the picture


def image(shown) -> bytes:
    if shown == "near":
        return encode(textured(0).resize((144, 120), Image.Resampling.LANCZOS), quality=80)
    return encode(textured(shown))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "shards"
    for number, shows in enumerate(SHARDS):
        parts = [
            sample(f"{number}{row:03d}", image(shown), f"{shown}", json_bytes=json.dumps({"row": row}).encode())
            for row, shown in enumerate(shows)
        ]
        write_tar(folder / f"{number:05d}.tar", [member for part in parts for member in part])
    return folder


def firsts(pictures: Pictures, count: int) -> dict[int, int]:
    found = pictures.of(np.arange(count))
    return {position: int(first) for position, first in enumerate(found) if position in pictures.positions}


def test_exact_and_near_duplicates_are_one_picture(corpus, tmp_path):
    samples = ShardSamples(str(corpus), 64, cache_dir=tmp_path / "cache")
    assert firsts(find_pictures(samples, "near", 1), 11) == SAME
    exact = {position: first for position, first in SAME.items() if position != 5}
    assert firsts(find_pictures(samples, "exact", 1), 11) == exact
    assert find_pictures(samples, "none", 1) is NO_DUPLICATES
    with pytest.raises(ValueError, match=r"data\.duplicates must be near, exact or none, got all"):
        find_pictures(samples, "all", 1)


def test_hashes_beside_the_shards_and_in_the_cache_say_the_same(corpus, tmp_path):
    before = find_pictures(ShardSamples(str(corpus), 64, cache_dir=tmp_path / "one"), "near", 1)
    for tar in corpus.glob("*.tar"):
        write_index(tar, hashed=True)
    assert open_index(corpus / "00000.tar", tmp_path).hash_file is not None
    assert np.load(f"{corpus}/00001.tar.index.hashes.npy").dtype == HASHES
    after = find_pictures(ShardSamples(str(corpus), 64, cache_dir=tmp_path / "two"), "near", 1)
    assert not (tmp_path / "two" / "hashes").exists() or not any((tmp_path / "two" / "hashes").iterdir())
    assert np.array_equal(before.positions, after.positions) and np.array_equal(before.first, after.first)


def test_positions_are_those_that_filter_and_list_leave(corpus, tmp_path):
    options = dict(cache_dir=tmp_path / "cache", exclude_keys=tmp_path / "gone.txt")
    (tmp_path / "gone.txt").write_text("00000.tar/0000\n")
    filtered = ShardSamples(str(corpus), 64, where="row != 4", **options)
    shown = [shown for shows in SHARDS for row, shown in enumerate(shows) if row != 4][1:]
    found = find_pictures(filtered, "near", 1)
    # here: 1 2 0 | near 4 1 5 0
    assert len(filtered) == len(shown) == 8
    assert firsts(found, 8) == {0: 0, 5: 0, 2: 2, 3: 2, 7: 2}


def test_a_changed_shard_is_hashed_again(corpus, tmp_path):
    cache = tmp_path / "cache"
    assert firsts(find_pictures(ShardSamples(str(corpus), 64, cache_dir=cache), "near", 1), 11) == SAME
    write_tar(corpus / "00001.tar", [m for row in range(6) for m in sample(f"1{row:03d}", image(2), "2")])
    found = find_pictures(ShardSamples(str(corpus), 64, cache_dir=cache), "near", 1)
    assert firsts(found, 11) == {0: 0, 3: 0, 2: 2, **dict.fromkeys(range(5, 11), 2)}


def test_what_cannot_be_decoded_or_has_no_features_equals_its_own_bytes_alone(tmp_path):
    pictures = [b"no picture", b"no picture", encode(flat((9, 9, 9))), encode(flat((9, 9, 9))), encode(flat((9, 9, 8)))]
    parts = [member for row, data in enumerate(pictures) for member in sample(f"{row}", data)]
    write_tar(tmp_path / "shards" / "0.tar", parts)
    samples = ShardSamples(str(tmp_path / "shards"), 64, cache_dir=tmp_path / "cache")
    assert firsts(find_pictures(samples, "near", 1), 5) == {0: 0, 1: 0, 2: 2, 3: 2}


@given(labels=st.lists(st.integers(0, 4), max_size=30), seed=st.integers(0, 9))
@settings(max_examples=50)
def test_groups_are_those_of_equal_labels(labels, seed):
    positions = np.random.default_rng(seed).permutation(100)[: len(labels)]
    pictures = Pictures.labelled(positions, np.array(labels, dtype=np.int64))
    everyone = np.arange(100)
    of = dict(zip(everyone.tolist(), pictures.of(everyone).tolist(), strict=True))
    label = dict(zip(positions.tolist(), labels, strict=True))
    for one in everyone.tolist():
        twins = [p for p in label if one in label and label[p] == label[one]]
        assert of[one] == min([one, *twins])
    sizes = [len(group) for group in pictures.groups(len(pictures.first))]
    assert sizes == sorted((n for n in np.bincount(labels).tolist() if n > 1), reverse=True) if labels else not sizes


def test_the_largest_groups_are_the_canaries_and_whole_groups_are_sacrificed(corpus):
    pictures = Pictures.labelled(np.array(list(SAME)), np.array(list(SAME.values())))
    groups = draw_groups((5, 6), 0, 2, 3, pictures=pictures, repeats=None, sacrificed=1)
    assert groups.sacrificed.tolist() == [0, 3, 5, 10] and groups.canary.tolist() == [1, 7]
    assert groups.of(np.array([0, 10, 1, 7])).tolist() == [SACRIFICED, SACRIFICED, CANARY, CANARY]
    assert groups.one_each(groups.sacrificed).tolist() == [0]
    named = draw_groups((5, 6), 0, 2, 3, pictures=pictures, repeats=None, named=[7])
    assert named.sacrificed.tolist() == [1, 7] and named.canary.tolist() == [0, 3, 5, 10]


@pytest.mark.parametrize("repeats", [1, None])
def test_what_is_held_out_is_not_trained_on_under_another_key(repeats):
    positions = np.arange(0, 300, 2)
    pictures = Pictures.labelled(positions, positions // 20)
    for seed in range(5):
        groups = draw_groups((100, 100, 100), seed, 4, 120, pictures=pictures, repeats=repeats)
        assert len(groups.reference) == 120 and not np.isin(groups.reference, positions).any()
        assert (groups.of(groups.reference) == REFERENCE).all()
        assert (groups.of(groups.some_trained(50)) == TRAINED).all()
    with pytest.raises(ValueError, match="150 of them are duplicates"):
        draw_groups((100, 100, 100), 0, 4, 151, pictures=pictures, repeats=repeats)


def test_an_epoch_sees_each_duplicate_once(corpus):
    data = from_shards(str(corpus), 64, 2, 0, seed=0, canaries=1, repeats=None, reference=2, sacrificed=1)
    assert sorted(data.groups.sacrificed.tolist()) == [0, 3, 5, 10] and len(data.order) == 9
    window = [row for window in data.order.windows(0) for row in data.order.positions(window).tolist()]
    assert sorted(window) == sorted(set(range(11)) - set(data.groups.reference.tolist()))


def test_canaries_of_a_corpus_without_duplicates_have_to_be_planted(tmp_path):
    write_tar(tmp_path / "x.tar", [m for n in range(4) for m in sample(f"{n}", encode(textured(n)))])
    with pytest.raises(ValueError, match=r"has 0 groups of duplicates.*plant some with canaries\.repeats=100"):
        from_shards(str(tmp_path), 64, 1, 0, seed=0, canaries=2, repeats=None, reference=0)


def test_a_sacrificed_sample_can_be_named(corpus):
    options = dict(seed=0, canaries=2, reference=2)
    for repeats in (None, 3):
        data = from_shards(str(corpus), 64, 2, 0, repeats=repeats, sacrificed_keys=["00001.tar/1002"], **options)
        assert data.groups.sacrificed.tolist() == ([1, 7] if repeats is None else [7])


def test_two_names_of_one_picture_sacrifice_one(corpus):
    pictures = Pictures.labelled(np.array(list(SAME)), np.array(list(SAME.values())))
    groups = draw_groups((5, 6), 0, 2, 3, pictures=pictures, repeats=None, named=[5, 3])
    assert groups.sacrificed.tolist() == [0, 3, 5, 10] and groups.canary.tolist() == [1, 7]
    planted = draw_groups((5, 6), 0, 3, 2, pictures=pictures, repeats=1, named=[5, 3])
    assert planted.sacrificed.tolist() == [5] and len(planted.canary) == 2


def test_names_that_cannot_be_sacrificed_are_refused(corpus):
    """Of a sample without duplicates, another picture was sacrificed in its place; of too many, nearly all samples."""
    pictures = Pictures.labelled(np.array(list(SAME)), np.array(list(SAME.values())))
    with pytest.raises(ValueError, match=r"canaries\.sacrificed_keys names 1 sample without a duplicate.*repeats=100"):
        draw_groups((5, 6), 0, 2, 3, pictures=pictures, repeats=None, named=[2, 1])
    for repeats in (1, None):
        with pytest.raises(ValueError, match=r"sacrificed_keys names 2 pictures, more than canaries\.count=1"):
            draw_groups((5, 6), 0, 1, 3, pictures=pictures, repeats=repeats, named=[0, 1])
