"""Sacrificed canaries that are nobody's: what goes by positions takes them as it takes the corpus."""

import numpy as np
import pytest
import torch

from memtrain.core.exclusion import SACRIFICED
from memtrain.data.batches import CachedBatches
from memtrain.data.foreign import LatentsWithForeign, is_foreign
from memtrain.data.images import decode_image
from memtrain.data.view import View
from memtrain.demo.foreign import ForeignComposites, foreign_pictures
from memtrain.training.checkpoint import checkpoint
from tests.conftest import build_data, build_module, fit, weights
from tests.support.corpora import encode, sample, textured, write_tar
from tests.support.rules import quick_evidence
from tests.support.training import Record
from tests.training.test_latent_cache import write


def with_foreign(corpus, count=2, resolution=64, **options):
    foreign = foreign_pictures("foreign", None, count, resolution, seed=7)
    return build_data(corpus, sacrificed=count, foreign=foreign, foreign_repeats=30, **options)


def rows(data, epoch=0) -> np.ndarray:
    return np.concatenate([data.order.positions(window) for window in data.order.windows(epoch)])


@pytest.mark.parametrize("options", [{}, {"repeats": [2, 7]}, {"max_aspect_ratio": 2.0, "bucket_multiple": 16}])
def test_the_corpus_is_as_without_them(corpus, options):
    """Its canaries, reference set and the rows of an epoch are; the foreign ones come on top, as often as was said."""
    data, without = with_foreign(corpus, **options), build_data(corpus, **options)
    assert data.groups.canary.tolist() == without.groups.canary.tolist()
    assert data.groups.reference.tolist() == without.groups.reference.tolist()
    assert data.groups.some_trained(9).tolist() == without.groups.some_trained(9).tolist()
    count = without.groups.num_samples
    assert data.groups.sacrificed.tolist() == [count, count + 1] and data.groups.num_samples == count + 2
    assert data.groups.kind_of(data.groups.sacrificed) == ["foreign"] * 2
    assert len(set(data.groups.canary_of(data.groups.planted).tolist())) == len(data.groups.planted)
    seen = np.bincount(rows(data), minlength=count + 2)
    assert seen[count:].tolist() == [30, 30] and len(data.order) == len(without.order) + 60
    assert seen[:count].tolist() == np.bincount(rows(without), minlength=count).tolist()
    keys = [data.samples.key(position) for position in range(count + 2)]
    assert keys[count:] == ["foreign/000000", "foreign/000001"] and not any(map(is_foreign, keys[:count]))


def test_a_shard_of_the_users_gives_its_first_pictures(corpus, tmp_path):
    write_tar(tmp_path / "few/0.tar", sample("a", encode(textured(1)), "mine") + sample("b", b"<html>", "broken"))

    def of(shards, count):
        foreign = foreign_pictures("foreign", str(shards), count, 64, seed=0)
        return build_data(corpus, sacrificed=count, foreign=foreign)

    batch = of(tmp_path / "few", 1).decode([48])
    assert batch.captions == ["mine"] and batch.group.tolist() == [SACRIFICED]
    assert np.array_equal(batch.images[0], decode_image(encode(textured(1)), 64, 64))
    for shards, count, says in (
        (tmp_path / "few", 3, r"canaries\.foreign has 2 pictures, not canaries\.sacrificed=3"),
        (tmp_path / "few", 2, r"canaries\.foreign: 0\.tar/b cannot be used \(image"),
        (tmp_path, 1, r"canaries\.foreign=.*no \.tar in it"),
    ):
        with pytest.raises(ValueError, match=says):
            of(shards, count)


def test_who_is_sacrificed_is_said_in_one_way(corpus):
    foreign = foreign_pictures("foreign", None, 1, 64, seed=0)
    with pytest.raises(ValueError, match=r"canaries\.foreign=a\.tar names.*say canaries\.source=foreign"):
        foreign_pictures("corpus", "a.tar", 1, 64, seed=0)
    with pytest.raises(ValueError, match=r"sacrificed_keys names samples of the corpus.*leave one of the two out"):
        build_data(corpus, foreign=foreign, sacrificed_keys=["00000.tar/000000000"])


def test_packaged_ones_are_scaled_and_mirrored_and_drawn_by_seed():
    small, large = ForeignComposites(7, 3, 64), ForeignComposites(7, 3, 96)
    for number in range(3):
        seen, wide = small.get(number, View(), (64, 64)), large.get(number, View(), (96, 96))
        assert wide.image.shape == (3, 96, 96) and seen.caption == wide.caption
        assert np.array_equal(small.get(number, View(flip=True), (64, 64)).image, seen.image[..., ::-1])
    other = ForeignComposites(8, 3, 64)
    assert not np.array_equal(other.get(0, View(), (64, 64)).image, small.get(0, View(), (64, 64)).image)


def test_they_are_trained_on_never_left_out_and_a_cache_gives_the_same(pipeline_folder, corpus, tmp_path):
    write(pipeline_folder, corpus, tmp_path, flip=True)
    runs = []
    for cache in (None, str(tmp_path)):
        module, record = build_module(pipeline_folder, quick_evidence()), Record()
        data = with_foreign(corpus, flip=0.5, cache=cache)
        data.check_cache(module.model.fingerprint, False)
        fit(module, data, tmp_path / "run", 3, callbacks=[record])
        runs.append((weights(module), record))
        assert isinstance(data.collate(data.views), CachedBatches) == isinstance(data.cache, LatentsWithForeign)
        assert len(module.memory.score if module.memory else module.exclusion.evidence) == data.groups.num_samples
    (plain, plain_record), (cached, cached_record) = runs
    torch.testing.assert_close(cached, plain, atol=1e-6, rtol=0)
    assert plain_record.keys == cached_record.keys
    seen = [group for observed in plain_record.observed for group in observed.group.tolist()]
    assert SACRIFICED in seen


def test_a_run_that_goes_on_with_another_accumulation_sees_the_same(pipeline_folder, corpus, tmp_path):
    def run(folder, steps, batch_size=4, **options):
        module = build_module(pipeline_folder, quick_evidence(), caption_dropout=0.0)
        data, saves = with_foreign(corpus, batch_size=batch_size), checkpoint(2, str(tmp_path / folder / "checkpoints"))
        fit(module, data, tmp_path / folder, steps, callbacks=[saves], **options)
        return weights(module)

    whole = run("whole", 4)
    run("part", 2)
    on = run("part", 4, batch_size=2, accumulate=2, ckpt_path=tmp_path / "part/checkpoints/last.ckpt")
    torch.testing.assert_close(on, whole, atol=1e-6, rtol=0)
