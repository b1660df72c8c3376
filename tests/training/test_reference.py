"""The reference set is scored as what is trained on is, as seldom as the rule allows, and robustly."""

import json
import logging
import math
import shutil
from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from memtrain.core import diffusion
from memtrain.core.exclusion import REFERENCE, FixedThreshold, KeepAll
from memtrain.core.statistics import BinnedMoments
from memtrain.core.streams import Stream, place_seed
from memtrain.data.remote import ShardMissing
from memtrain.data.samples import ShardSamples
from memtrain.training.checkpoint import checkpoint
from memtrain.training.methods import EmbeddingNoise, Method, RandomTokensAdded
from memtrain.training.optimizers import AdamW
from memtrain.training.resume import checkpoints_in
from memtrain.training.score_memory import Scoring
from tests.conftest import build_data, build_module, fit
from tests.support.corpora import encode, sample, textured, write_tar
from tests.support.rules import quick_evidence, quick_rules


class Seen(pl.Callback):
    """Rows trained on and rows of the reference set, of every step."""

    def __init__(self):
        self.trained, self.reference, self.kept = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.trained.append(pl_module.last_step.trained.observed)
        reference = pl_module.last_step.reference
        self.reference.append(reference and reference.observed)
        self.kept.append(reference and reference.decision.keep_mask)

    @property
    def turns(self):
        return [observed for observed in self.reference if observed is not None]


def still(pipeline, exclusion=None, **options):
    """A module that does not learn: the model is the same at every step."""
    module = build_module(pipeline, exclusion, **(dict(caption_dropout=0.0, reference_every=1) | options))
    module.optimizer_config = AdamW(1e-30, (0.9, 0.999), 0.0, 1e-3, "constant", 0, eight_bit=False)
    return module


def x(observed) -> torch.Tensor:
    return observed.score.log() - observed.loss.log() / 2


def test_trained_and_reference_rows_of_one_population_score_alike(pipeline_folder, corpus, tmp_path):
    """The statistic of `evidence` was off by a quarter at high noise where there is offset noise."""
    seen = Seen()
    module = still(pipeline_folder, noise_offset=0.5, reference_batch=16)
    fit(module, build_data(corpus, 16, reference=24, canaries=0), tmp_path, 40, callbacks=[seen])
    groups = [seen.trained, seen.reference]
    high = [torch.cat([x(o)[o.timesteps >= 700] for o in group]) for group in groups]
    middle = [torch.cat([x(o)[o.timesteps < 700] for o in group]) for group in groups]
    for ours, theirs in (high, middle):
        assert min(len(ours), len(theirs)) > 150
        error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
        assert abs(ours.mean() - theirs.mean()) < 4 * error, (ours.mean(), theirs.mean(), error)


@pytest.mark.parametrize("method", [None, RandomTokensAdded(1.0, 2), EmbeddingNoise(0.5)])
@pytest.mark.parametrize("views", [{}, {"crop": "random", "flip": 0.5}])
def test_a_trained_row_and_a_reference_row_of_the_same_draws_are_equal(
    pipeline_folder, corpus, tmp_path, monkeypatch, method, views
):
    """The same pictures at the same places with the same draws, once in either role: loss and score are equal."""
    method_seed = partial(place_seed, 7, Stream.METHOD)
    monkeypatch.setattr("memtrain.training.predictor.place_seed", lambda seed, stream, *place: method_seed(*place))
    monkeypatch.setattr("memtrain.training.reference.place_seed", lambda seed, *rest: seed)
    module = still(pipeline_folder, noise_offset=0.1, reference_batch=4, method=method or Method())
    predictor, draw = module.predictor, module.predictor.draw
    monkeypatch.setattr(predictor, "draw", lambda stream, *rows: draw(Stream.TRAIN, *rows))
    seen, data = Seen(), build_data(corpus, 4, **views)
    fit(module, data, tmp_path, 4, callbacks=[seen])
    for turn, observed in enumerate(seen.reference):
        rows = [(turn, place, int(index)) for place, index in enumerate(observed.sample_index)]
        with torch.no_grad():
            visit = predictor.visit(data.collate(data.views)(rows), turn, Stream.TRAIN)
            loss, trained = visit.found.loss, visit.observed
        torch.testing.assert_close(observed.loss, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(observed.score, trained.score, rtol=1e-4, atol=0)
        assert torch.equal(observed.timesteps, trained.timesteps) and observed.scored.all()


def test_a_reference_row_is_what_the_equations_say(pipeline_folder, corpus, tmp_path):
    """By hand: posterior sampled, offset noise added, caption in place."""
    module, seen = still(pipeline_folder, noise_offset=0.1, reference_batch=3), Seen()
    data = build_data(corpus, 4)
    fit(module, data, tmp_path, 1, callbacks=[seen])
    (observed,), model = seen.turns, module.model
    batch = data.decode(observed.sample_index.tolist())
    draws = diffusion.draw(7, Stream.REFERENCE_ROW, 0, range(3), module.latent_shape, module.model.noise_process)
    mean, std = model.encode_posterior(batch.images)
    latents = model.sample_latents(mean, std, draws.posterior_noise)
    noise = draws.noise + 0.1 * draws.offset_noise
    noisy = model.noise_process.add_noise(latents, noise, draws.timesteps)
    with torch.no_grad():
        cond = model.predict(noisy, draws.timesteps, model.encode(batch.captions))
        null = model.predict(noisy, draws.timesteps, model.encode([""] * 3))
    torch.testing.assert_close(observed.loss, (cond - noise).square().mean((1, 2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(observed.score, (cond - null).flatten(1).norm(dim=1), rtol=1e-3, atol=0)
    assert (observed.group == REFERENCE).all()


# ---- as seldom as the rule allows


@pytest.mark.parametrize("needs", [False, True])
def test_by_default_it_is_scored_where_the_rule_needs_it_alone(pipeline_folder, corpus, tmp_path, caplog, needs):
    module = build_module(
        pipeline_folder,
        quick_evidence() if needs else FixedThreshold(2.0),
        reference_batch=None,
        reference_every=4,
    )
    seen = Seen()
    with caplog.at_level(logging.INFO):
        fit(module, build_data(corpus, 3), tmp_path, 8, accumulate=2, callbacks=[seen])
    assert [observed is not None for observed in seen.reference] == [needs, False, False, False] * 2
    assert all(len(observed.score) == 3 for observed in seen.turns)  # half of 3 x 2
    assert ("reference.batch_size=16" in caplog.text) != needs


def test_an_explicit_number_is_obeyed_for_every_rule_that_scores(pipeline_folder, corpus, tmp_path):
    for scoring, turns in ((Scoring(), 4), (Scoring(every=0), 0)):
        seen = Seen()
        module = build_module(pipeline_folder, KeepAll(), reference_batch=5, reference_every=1, scoring=scoring)
        fit(module, build_data(corpus), tmp_path, 4, callbacks=[seen])
        assert len(seen.turns) == turns and all(len(observed.score) == 5 for observed in seen.turns)


def test_every_reference_sample_has_its_turn(pipeline_folder, corpus, tmp_path):
    seen, data = Seen(), build_data(corpus)
    fit(build_module(pipeline_folder, reference_batch=5, reference_every=1), data, tmp_path, 8, callbacks=[seen])
    shown = torch.cat([observed.sample_index for observed in seen.turns]).tolist()
    assert shown == data.groups.reference.tolist() * 5


@pytest.mark.parametrize("options", [dict(reference_batch=0), dict(reference_every=0)])
def test_a_turn_of_nobody_is_refused(pipeline_folder, options):
    with pytest.raises(ValueError, match=r"must be >= 1.*reference\.batch_size=null"):
        build_module(pipeline_folder, **options)


# ---- ranks, buckets, bad pictures


class Ranks:
    """A trainer as each of several ranks would have it."""

    def __init__(self, trainer, rank: int, world: int):
        self._trainer, self.global_rank, self.world_size = trainer, rank, world

    def __getattr__(self, name):
        return getattr(self._trainer, name)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_what_is_scored_does_not_depend_on_ranks(pipeline_folder, corpus, tmp_path, world):
    """5 rows: two ranks used to score 6 of them."""
    module = still(pipeline_folder, reference_batch=5)
    trainer = fit(module, build_data(corpus), tmp_path, 1)
    whole, valid = module.reference.observe(trainer, module.predictor, 1, 5)
    assert len(valid) == 5 and valid.all()
    parts = []
    for rank in range(world):
        parts.append(module.reference.observe(Ranks(trainer, rank, world), module.predictor, 1, 5))
    assert len({len(valid) for _, valid in parts}) == 1  # as many on each, for the gather
    valid = torch.cat([valid for _, valid in parts])
    assert valid.tolist() == [True] * 5 + [False] * (len(valid) - 5)
    for name in ("sample_index", "timesteps", "score", "loss", "scored"):
        found = torch.cat([getattr(observed, name) for observed, _ in parts])
        torch.testing.assert_close(found[:5], getattr(whole, name), rtol=1e-4, atol=1e-5)
        assert name != "scored" or not found[5:].any()


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_turn_has_samples_of_one_bucket(pipeline_folder, tmp_path, crop):
    pictures = [encode(textured(n, size=(64, 64) if n % 3 else (112, 64))) for n in range(36)]
    write_tar(tmp_path / "0.tar", [part for n, picture in enumerate(pictures) for part in sample(str(n), picture)])
    data = build_data(tmp_path, max_aspect_ratio=2.0, bucket_multiple=16, canaries=0, reference=9, crop=crop)
    module, seen = build_module(pipeline_folder, reference_batch=4, reference_every=1), Seen()
    fit(module, data, tmp_path, 12, callbacks=[seen])
    shown, sizes = {}, set()
    for observed, kept in zip(seen.turns, seen.kept, strict=True):
        assert len(observed.score) == 4 and len(observed.latent_numel.unique()) == 1
        area = {math.prod(data.samples.size_of(int(index))) for index in observed.sample_index}
        assert {int(observed.latent_numel[0]) * 16} == area  # 4 channels, an eighth of the side
        sizes |= area
        assert torch.equal(kept, observed.scored)
        for index in observed.sample_index[observed.scored].tolist():
            shown[index] = shown.get(index, 0) + 1
    assert len(sizes) > 1 and set(shown) == set(data.groups.reference.tolist())
    assert max(shown.values()) - min(shown.values()) <= 1  # buckets small or large


@pytest.mark.parametrize("crop", ["center", "random"])
def test_reference_pictures_that_cannot_be_decoded_say_nothing(pipeline_folder, tmp_path, caplog, crop):
    pictures = [encode(textured(n)) for n in range(24)]
    probe = tmp_path / "probe"
    for folder, bad in ((probe, ()), (tmp_path / "shards", None)):
        if bad is None:
            bad = build_data(probe, canaries=0).groups.reference.tolist()[:3]
        parts = [part for n, p in enumerate(pictures) for part in sample(f"{n:09d}", b"<html>" if n in bad else p)]
        write_tar(folder / "0.tar", parts)
    data = build_data(tmp_path / "shards", canaries=0, crop=crop, duplicates="none")
    module, seen = build_module(pipeline_folder, quick_evidence(), reference_batch=8, reference_every=1), Seen()
    fit(module, data, tmp_path, 2, callbacks=[seen])
    lost = set(data.problems)
    assert lost and all(key in caplog.text for key in lost)
    for observed, kept in zip(seen.turns, seen.kept, strict=True):
        readable = torch.tensor([data.samples.key(i) not in lost for i in observed.sample_index.tolist()])
        assert torch.equal(observed.scored, readable) and not kept[~readable].any()


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_shard_that_is_gone_for_the_reference_set_ends_the_run_with_a_checkpoint(
    pipeline_folder, corpus, tmp_path, monkeypatch, crop
):
    """Its samples are not passed over as bad ones are: the run would go on by another reference set."""
    data = build_data(corpus, crop=crop)
    held_out = set(data.groups.reference.tolist())

    def get(self, index, *view, get=ShardSamples.get):
        if index in held_out:
            raise ShardMissing("00001.tar is gone")
        return get(self, index, *view)

    monkeypatch.setattr(ShardSamples, "get", get)
    module = build_module(pipeline_folder, quick_evidence(), reference_batch=8, reference_every=1)
    with pytest.raises(ShardMissing, match=r"00001\.tar is gone"):
        fit(module, data, tmp_path, 9, callbacks=[checkpoint(9, str(tmp_path))])
    assert list(checkpoints_in(tmp_path)) == [1]  # of the step whose turn it was; there is no other


def test_cached_latents_serve_the_reference_set(pipeline_folder, corpus, tmp_path):
    from memtrain.training.latent_cache import write_latents

    shards = tmp_path / "shards"
    shutil.copytree(corpus, shards)
    plain, cached = build_data(shards), None
    module = still(pipeline_folder)
    write_latents(
        module.model, plain.samples, range(len(plain.samples.shards)), str(tmp_path / "cache"),
        dtype="float32", flip=False, batch_size=8, num_workers=0, device=torch.device("cpu"), progress=False,
    )  # fmt: skip
    cached = build_data(shards, cache=str(tmp_path / "cache"))
    cached.check_cache(module.model.fingerprint, text_encoder_is_trained=False)
    found = []
    for data in (plain, cached):
        seen = Seen()
        fit(still(pipeline_folder), data, tmp_path / "run", 2, callbacks=[seen])
        found.append(seen)
    for one, other in zip(found[0].turns, found[1].turns, strict=True):
        assert torch.equal(one.sample_index, other.sample_index) and other.scored.all()
        torch.testing.assert_close(one.score, other.score, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-4, atol=1e-5)


# ---- what is not finite, and what says nothing


class PoisonReference(Method):
    """The first row's embedding of some calls is NaN."""

    def __init__(self, calls):
        self.calls, self.call = calls, 0

    def embeddings(self, hidden, captioned, generators):
        self.call += 1
        if self.call in self.calls:
            hidden = hidden.clone()
            hidden[0] = torch.nan
        return hidden


@pytest.mark.parametrize("name", ["calibrated", "evidence", "z_scores"])
def test_one_reference_score_that_is_not_finite_does_not_switch_training_off(
    pipeline_folder, corpus, tmp_path, caplog, name
):
    """Its NaN used to enter the rule's moments, for ever: nobody was kept any more."""
    rule = quick_rules()[name]
    method = PoisonReference({4})  # train, reference, train, reference: that of the second step
    module, seen = build_module(pipeline_folder, rule, method=method, reference_every=1), Seen()
    data = build_data(corpus, sacrificed=1)
    fit(module, data, tmp_path, 10, callbacks=[seen])
    assert module.stops.bad_steps == 0 and module.reference.not_finite == 1
    bad = seen.reference[1]
    assert not bad.scored[0] and not seen.kept[1][0] and bad.scored[1:].all()
    assert data.samples.key(int(bad.sample_index[0])) in caplog.text
    assert all(value.isfinite().all() for value in rule.state_dict().values() if value.is_floating_point())
    assert rule.decide(seen.trained[-1]).threshold.isfinite().any()


@pytest.fixture
def zero_terminal(pipelines, tmp_path):
    """A v-prediction pipeline whose last timestep is noise alone."""
    folder = tmp_path / "zero_terminal"
    shutil.copytree(pipelines["v_prediction"], folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rescale_betas_zero_snr": True}))
    return folder


@pytest.mark.parametrize("remembers", [False, True])
def test_where_noise_is_all_a_row_says_nothing(zero_terminal, corpus, tmp_path, monkeypatch, remembers):
    """d is exactly 0 there, whatever the caption; its logarithm, taken for -27, tore the last bin's deviation."""
    rules = quick_rules()
    rule, seen = rules["evidence"], Seen()
    options = dict(scoring=Scoring(every_visits=2)) if remembers else {}
    module = still(zero_terminal, rule, min_snr_gamma=5.0, reference_batch=4, **options)
    assert module.model.noise_process.alphas_cumprod[-1] == 0
    draw = module.predictor.draw

    def drawn(*rows):
        draws = draw(*rows)
        draws.timesteps[::2] = 999
        return draws

    monkeypatch.setattr(module.predictor, "draw", drawn)
    fit(module, build_data(corpus, sacrificed=1), tmp_path, 12, callbacks=[seen])
    learned = BinnedMoments(1, half_life=50)
    for observed in seen.turns:  # two of four rows, or fewer where the last timestep was drawn as well
        said = observed.timesteps[observed.timesteps < 999]
        learned.update(torch.zeros(len(said)), torch.zeros(len(said), dtype=torch.long))
    assert torch.equal(rule.reference.count, learned.count) and rule.reference.std.max() < 2
    for observed in [*seen.trained, *seen.turns]:
        last = observed.timesteps == 999
        assert last[::2].all() and not observed.scored[last].any() and observed.captioned.all()
        assert observed.loss.isfinite().all()
    if remembers:
        assert (module.memory.score[~module.memory.score.isnan()] > 0).all()
    assert sum(observed.scored.sum() for observed in seen.trained) > 0
