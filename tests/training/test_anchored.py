"""The anchored score: how far a run has moved its predictions, and what it needs to know where they were."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from memtrain.callbacks.curves import MemorizationCurves
from memtrain.callbacks.ledger import Ledger
from memtrain.core.exclusion import FixedThreshold
from memtrain.core.scores import ANCHORED, MAGNITUDE, SCORES
from memtrain.core.streams import Stream, place_seed
from memtrain.data.ledger import read_about, read_ledger
from memtrain.training.checkpoint import checkpoint
from memtrain.training.methods import EmbeddingNoise
from memtrain.training.score_memory import Scoring
from tests.conftest import build_data, build_module, fit, weights
from tests.support.adapters import low_rank
from tests.support.callbacks import validation
from tests.support.training import Record

THRESHOLD = 2.4  # keeps some


def build(pipeline, exclusion=None, rule=ANCHORED, kinds=SCORES, **options):
    return build_module(pipeline, exclusion, scoring=Scoring(kinds=kinds, rule=rule), **options)


def numbers(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("adapted", [False, True], ids=["all_weights", "adapter"])
def test_it_is_the_distance_to_what_the_stock_networks_predict(pipeline_folder, corpus, tmp_path, adapted):
    """At the first step 0; then by hand, with the networks of the pipeline that the run began with. Text encoders are
    trained, too, and the method draws the same noise for both embeddings."""
    method = EmbeddingNoise(0.1)
    trained = dict(adapter=low_rank(text_encoder=True)) if adapted else dict(model=dict(train_text_encoder=True))
    module = build(pipeline_folder, kinds=(ANCHORED,), method=method, caption_dropout=0.0, **trained)
    copied = numbers(module.parameters()) - numbers(module.model.parameters())
    assert copied == (0 if adapted else numbers(module.trained_parameters()))
    record = Record()
    fit(module, build_data(corpus), tmp_path, 2, callbacks=[record])
    first, second = record.observed
    assert not first.score.any() and not first.scored.any()
    assert second.scored.all() and (second.score > 0).all()

    batch, model = record.window[0], module.model
    with torch.no_grad():
        observed = module.predictor.visit(batch, 5, Stream.TRAIN).observed
    stock = StableDiffusionPipeline.from_pretrained(pipeline_folder, dtype=torch.float32, local_files_only=True)
    mean, std = model.encode_posterior(batch.images)
    draws = module.predictor.draw(Stream.TRAIN, 5, batch.place.tolist(), mean.shape[1:])
    kept = stock.scheduler.alphas_cumprod[draws.timesteps][:, None, None, None]  # of the signal
    noisy = kept.sqrt() * model.sample_latents(mean, std, draws.posterior_noise) + (1 - kept).sqrt() * draws.noise

    @torch.no_grad()
    def predicted(text_encoder, unet):
        hidden = text_encoder(model.tokenize(batch.captions))[0]
        drawn = [np.random.default_rng(place_seed(module.seed, Stream.METHOD, 5, p)) for p in batch.place.tolist()]
        hidden = method.embeddings(hidden, torch.ones(len(hidden)).bool(), drawn)
        return unet(noisy, draws.timesteps, hidden).sample

    moved = predicted(model.text_encoder, model.unet) - predicted(stock.text_encoder, stock.unet)
    torch.testing.assert_close(observed.score, moved.flatten(1).norm(dim=1), atol=1e-5, rtol=1e-5)


def train(pipeline, corpus, folder, steps=6, ckpt_path=None, threshold=THRESHOLD, **options):
    module = build(pipeline, FixedThreshold(threshold), **options)
    looks = [MemorizationCurves(every=3, high_noise=0.5), validation(every=9), Ledger(1.0, 7)]
    callbacks = [*looks, checkpoint(3, str(folder / "checkpoints"), keep=9)]
    trainer = fit(module, build_data(corpus), folder, steps, callbacks=callbacks, ckpt_path=ckpt_path)
    return module, trainer.callback_metrics, read_ledger(folder).to_table().to_pylist()


@pytest.fixture(scope="module")
def whole(pipeline_folder, corpus, tmp_path_factory):
    """A run that excludes by the anchored score, and its folder, metrics and ledger."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(pipeline_folder, corpus, folder)


def test_the_rule_goes_by_it_and_the_ledger_has_both(whole, pipeline_folder, corpus, tmp_path):
    folder, _, metrics, rows = whole
    assert (read_about(folder).score, read_about(folder).second) == (ANCHORED, MAGNITUDE)
    assert all(row["kept"] == (row["score"] < THRESHOLD) and row["magnitude"] > 0 for row in rows)
    assert {row["kept"] for row in rows} == {True, False}
    for name in ("score/train", "val_score/train", "score_high_noise/reference"):
        assert metrics[name] != metrics[f"magnitude_{name}"] > 0
    assert "magnitude_auc_canary_vs_reference" in metrics and "magnitude_excluded/train" not in metrics

    # by the other score the same is seen of the reference set after step 0; before it nothing was learnt
    _, _, by_magnitude = train(pipeline_folder, corpus, tmp_path, 1, threshold=1e9, rule=MAGNITUDE)
    first = {row["key"]: (row["score"], row["magnitude"]) for row in rows if row["step"] == 0}
    assert first == {row["key"]: (row["anchored"], row["score"]) for row in by_magnitude if row["group"] == "reference"}
    assert {row["anchored"] for row in by_magnitude if row["group"] != "reference"} == {None}


def test_a_resumed_run_compares_with_the_same_base_bit_for_bit(whole, pipeline_folder, corpus, tmp_path):
    folder, module, _, rows = whole
    last = str(folder / "checkpoints" / "step-00000003.ckpt")
    assert not any(name.startswith("anchor") for name in torch.load(last, weights_only=True)["state_dict"])
    resumed, _, found = train(pipeline_folder, corpus, tmp_path, ckpt_path=last)
    assert torch.equal(weights(resumed), weights(module))
    assert found == rows


def test_a_base_that_is_another_or_not_known_is_refused(whole, pipeline_folder, corpus, tmp_path):
    folder = whole[0]
    last = str(folder / "checkpoints" / "last.ckpt")
    other = build_module(pipeline_folder)
    with torch.no_grad():
        other.model.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    other.export(tmp_path / "other", torch.float32)
    with pytest.raises(ValueError, match="scored against another base, whose unet had other weights; name that base"):
        train(tmp_path / "other", corpus, tmp_path, 7, last)
    with pytest.raises(ValueError, match=r"rule went by score\.rule=anchored, whose scores are no measure"):
        train(pipeline_folder, corpus, tmp_path, 7, last, kinds=(MAGNITUDE,), rule=MAGNITUDE)
    plain, plain_last = tmp_path / "plain", str(tmp_path / "plain" / "checkpoints" / "last.ckpt")
    train(pipeline_folder, corpus, plain, 1, kinds=(MAGNITUDE,), rule=MAGNITUDE)
    with pytest.raises(ValueError, match="took no anchored score, so it does not say what its base was"):
        train(pipeline_folder, corpus, tmp_path, 2, plain_last, rule=MAGNITUDE)


def test_wrong_kinds_are_named():
    with pytest.raises(ValueError, match=r"score\.kinds must be some of magnitude, anchored, got \['loss'\]"):
        Scoring(kinds=["loss"])
    with pytest.raises(ValueError, match=r"score\.rule must be one of .*, got anchored; score=both takes both"):
        Scoring(rule=ANCHORED)
