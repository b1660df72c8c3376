"""Sacrificed canaries that are nobody's: what goes by positions takes them as it takes the corpus."""

import numpy as np
import pytest
import torch

from memtrain.core.exclusion import SACRIFICED
from memtrain.data.batches import CachedBatches
from memtrain.data.foreign import LatentsWithForeign, is_foreign
from memtrain.data.view import View
from memtrain.demo.foreign import ForeignComposites, foreign_pictures
from memtrain.training.checkpoint import checkpoint
from tests.conftest import build_data, build_module, fit, weights
from tests.support.rules import quick_evidence
from tests.support.training import Record
from tests.training.test_latent_cache import write


def with_foreign(corpus, count=2, resolution=64, **options):
    foreign = foreign_pictures("foreign", None, count, resolution, seed=7)
    return build_data(corpus, sacrificed=count, foreign=foreign, foreign_repeats=9, **options)


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
    assert seen[count:].tolist() == [9, 9] and len(data.order) == len(without.order) + 18
    assert seen[:count].tolist() == np.bincount(rows(without), minlength=count).tolist()
    keys = [data.samples.key(position) for position in range(count + 2)]
    assert keys[count:] == ["foreign/000000", "foreign/000001"] and not any(map(is_foreign, keys[:count]))


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
        fit(module, data, tmp_path / "run", 8, callbacks=[record])
        runs.append((weights(module), record))
        assert isinstance(data.collate(data.views), CachedBatches) == isinstance(data.cache, LatentsWithForeign)
        assert len(module.memory.score if module.memory else module.exclusion.evidence) == data.groups.num_samples
    (plain, plain_record), (cached, cached_record) = runs
    torch.testing.assert_close(cached, plain, atol=1e-6, rtol=0)
    assert plain_record.keys == cached_record.keys
    seen = [group for observed in plain_record.observed for group in observed.group.tolist()]
    assert SACRIFICED in seen


def test_a_run_that_goes_on_with_another_batch_and_accumulation_sees_the_same(pipeline_folder, corpus, tmp_path):
    whole = build_module(pipeline_folder, quick_evidence(), caption_dropout=0.0)
    fit(whole, with_foreign(corpus), tmp_path / "whole", 6)
    folder = tmp_path / "part"
    fit(
        build_module(pipeline_folder, quick_evidence(), caption_dropout=0.0),
        with_foreign(corpus),
        folder,
        3,
        callbacks=[checkpoint(3, str(folder / "checkpoints"))],
    )
    on = build_module(pipeline_folder, quick_evidence(), caption_dropout=0.0)
    fit(on, with_foreign(corpus, batch_size=2), folder, 6, accumulate=2, ckpt_path=folder / "checkpoints/last.ckpt")
    torch.testing.assert_close(weights(on), weights(whole), atol=1e-6, rtol=0)
