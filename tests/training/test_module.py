"""Properties of a training run, on real tars and a real (tiny) Stable Diffusion."""

import math

import pytest
import torch

from memtrain.core.evidence import LATCHED, LikelihoodEvidence
from memtrain.core.exclusion import (
    EXCLUDE,
    PULL,
    REFERENCE,
    Decision,
    ExclusionRule,
    FixedThreshold,
    KeepAll,
    NormalizedThreshold,
    Observations,
)
from memtrain.core.scores import ANCHORED, MAGNITUDE
from memtrain.core.streams import Stream
from memtrain.training.checkpoint import checkpoint
from memtrain.training.score_memory import Scoring
from tests.conftest import build_data, build_module, fit, weights
from tests.support.corpora import encode, sample, textured, write_tar
from tests.support.rules import KeepNothing, quick_evidence
from tests.support.training import KillAt, Killed, Record


def run(pipeline, corpus, path, steps=4, batch_size=4, accumulate=1, exclusion=None, data=None, **options):
    module, record = build_module(pipeline, exclusion, **options), Record()
    before = weights(module).clone()
    fit(module, data or build_data(corpus, batch_size), path, steps, accumulate, callbacks=[record])
    return module, record, before


class KeepOddPlaces(ExclusionRule):
    """Keeps samples by a property of their own, so that any cut of the batch keeps the same ones."""

    def decide(self, observed):
        return Decision(observed.sample_index % 3 > 0, torch.zeros_like(observed.score))


def test_an_infinite_threshold_trains_the_same_weights_as_no_exclusion(pipeline_folder, corpus, tmp_path):
    first, _, before = run(pipeline_folder, corpus, tmp_path, exclusion=KeepAll())
    for action in (EXCLUDE, PULL):
        second, _, _ = run(pipeline_folder, corpus, tmp_path, exclusion=FixedThreshold(math.inf, action=action))
        assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), before)


def test_scoring_does_not_touch_training(pipeline_folder, corpus, tmp_path):
    first, _, _ = run(pipeline_folder, corpus, tmp_path, scoring=Scoring(every=1))
    second, _, _ = run(pipeline_folder, corpus, tmp_path, scoring=Scoring(every=0))
    assert torch.equal(weights(first), weights(second))


def test_everything_excluded_changes_nothing_and_is_counted(pipeline_folder, corpus, tmp_path, caplog):
    module, _, before = run(pipeline_folder, corpus, tmp_path, steps=3, exclusion=KeepNothing(), caption_dropout=0.0)
    assert torch.equal(weights(module), before)
    assert module.accumulation.updates_skipped == 3 and module.accumulation.samples_seen == 12
    assert all(torch.equal(a, b) for a, b in zip(module.ema.shadow_params, module.trained_parameters(), strict=True))
    state = module.trainer.optimizers[0].state
    assert not any(state.values())  # no momentum
    assert sum("every sample was excluded" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("kinds", [(MAGNITUDE,), (ANCHORED,)])
def test_a_pulled_row_is_drawn_to_what_is_predicted_without_its_caption(pipeline_folder, corpus, kinds):
    """The gradient by hand: of the loss of rows that are kept, and of the others' distance to a constant."""
    rule = FixedThreshold(1.0, action=PULL)
    module = build_module(pipeline_folder, rule, scoring=Scoring(kinds, kinds[0]), caption_dropout=0.0)
    batch = build_data(corpus).decode([0, 1, 2, 3])
    visit = module.predictor.visit(batch, 5, Stream.TRAIN)
    keep_mask, model, found = torch.tensor([True, False, True, False]), module.model, visit.found
    assert (found.null_output is None) == (kinds == (ANCHORED,))
    module._pulled(visit, ~keep_mask).sum().backward()
    gradient = [parameter.grad.clone() for parameter in module.trained_parameters()]

    module.zero_grad()
    timesteps, noisy = visit.observed.timesteps, found.noisy_latents
    with torch.no_grad():
        null = model.unet(noisy, timesteps, model.null(4).hidden).sample
    draws = module.predictor.draw(Stream.TRAIN, 5, batch.place.tolist(), module.latent_shape)
    aim = torch.where(keep_mask[:, None, None, None], draws.noise, null)
    output = model.unet(noisy, timesteps, model.encode(batch.captions).hidden).sample
    (output - aim).square().flatten(1).mean(dim=1).sum().backward()
    for own, parameter in zip(gradient, module.trained_parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad, atol=1e-6, rtol=1e-4)


def test_where_a_row_is_pulled_its_score_falls(pipeline_folder, corpus):
    """The same draws again and again: only the score can have changed."""
    module = build_module(pipeline_folder, FixedThreshold(1.0, action=PULL), caption_dropout=0.0)
    batch, optimizer = build_data(corpus).decode([0, 1, 2, 3]), torch.optim.Adam(module.trained_parameters(), 1e-3)
    scores = []
    for _ in range(6):
        visit = module.predictor.visit(batch, 5, Stream.TRAIN)
        scores.append(visit.observed.score)
        optimizer.zero_grad()
        module._pulled(visit, torch.ones(4, dtype=torch.bool)).sum().backward()
        optimizer.step()
    assert (scores[-1] < 0.8 * scores[0]).all()


def test_dropped_captions_score_zero_are_kept_and_enter_no_statistic(pipeline_folder, corpus, tmp_path):
    rule = quick_evidence()
    module, record, _ = run(
        pipeline_folder, corpus, tmp_path, exclusion=rule, caption_dropout=1.0, reference_every=1000
    )
    for observed, kept in zip(record.observed, record.kept, strict=True):
        assert observed.score.eq(0).all() and not observed.scored.any() and kept.all()
    assert rule.evidence.eq(0).all() and not rule.excluded.any()
    assert module.accumulation.updates_skipped == 0
    # even a rule that excludes everything keeps them
    _, record, _ = run(pipeline_folder, corpus, tmp_path, exclusion=KeepNothing(), caption_dropout=1.0)
    assert torch.cat(record.kept).all()


class EvenLatched(LikelihoodEvidence):
    """Half of the pictures were found memorized before the first step."""

    def setup(self, num_samples, num_timesteps):
        super().setup(num_samples, num_timesteps)
        self.state[::2] = LATCHED


def test_what_evidence_has_latched_is_left_out_with_and_without_its_caption(pipeline_folder, corpus, tmp_path):
    settings = dict(num_bins=1, half_life=50, canary_half_life=50, own_visits=0, own_limit=1.0, copies_weight=0.0)
    rule = EvenLatched(0.01, 0.1, 0.95, 2.0, 1.0, 5, latch=True, warmup=2, action=PULL, **settings)
    data = build_data(corpus, 4, canaries=0)
    _, record, _ = run(pipeline_folder, corpus, tmp_path, steps=6, exclusion=rule, data=data, caption_dropout=0.5)
    seen = Observations.concatenate(record.observed)
    assert torch.equal(torch.cat(record.kept), seen.picture % 2 == 1)
    assert len(torch.stack([seen.captioned, seen.picture % 2 == 1]).unique(dim=1).T) == 4  # of each kind some


def test_normalized_goes_by_the_latents_of_the_bucket(pipeline_folder, tmp_path):
    pictures = [encode(textured(n, size=(64, 64) if n % 2 else (112, 64))) for n in range(24)]
    write_tar(tmp_path / "0.tar", [part for n, picture in enumerate(pictures) for part in sample(str(n), picture)])
    options = dict(max_aspect_ratio=2.0, bucket_multiple=16, canaries=0, reference=3)
    data, rule = build_data(tmp_path, **options), NormalizedThreshold(0.05)
    _, record, _ = run(pipeline_folder, None, tmp_path, steps=12, data=data, exclusion=rule)
    numel = [4 * batch.images[0, 0].numel() // 8**2 for batch in record.window]  # 4 channels, an eighth of the side
    assert len(set(numel)) > 1
    for n, observed, kept in zip(numel, record.observed, record.kept, strict=True):
        assert (observed.latent_numel == n).all()
        assert torch.equal(kept, ~observed.captioned | (observed.score / math.sqrt(n) < 0.05))
    assert 0 < torch.cat(record.kept).float().mean() < 1


def test_the_null_forward_agrees_with_a_dropped_caption(pipeline_folder, corpus, tmp_path):
    module, _, _ = run(pipeline_folder, corpus, tmp_path, steps=1)
    latents, *_ = module.encode_samples([0, 1, 2])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([10, 500, 990])
    told = module.predictor.encode(["", "fox", ""], module.model.encode)
    score = module.predictor.predict_and_score(latents, noise, timesteps, told).score
    torch.testing.assert_close(score[[0, 2]], torch.zeros(2), atol=1e-5, rtol=0)
    assert score[1] > 1e-3


def test_the_reference_set_is_never_trained_on_and_canaries_often(pipeline_folder, corpus, tmp_path):
    data = build_data(corpus, batch_size=5)
    module, record, _ = run(pipeline_folder, corpus, tmp_path, steps=10, data=data)
    seen = [index for batch in record.keys for index in batch]
    assert not set(seen) & set(data.groups.reference.tolist())
    assert all((observed.group != REFERENCE).all() for observed in record.observed)
    epoch = seen[: len(data.order) // 5 * 5]
    assert sum(epoch.count(canary) for canary in data.groups.canary) >= 3 * 4 - 4  # less at most the remainder
    assert module.last_step.reference is None  # step 9 of reference_every=2: not due


@pytest.mark.parametrize(("denominator", "gamma"), [("kept", 5.0), ("all", None)])
def test_accumulation_equals_the_big_batch(pipeline_folder, corpus, tmp_path, denominator, gamma):
    action = EXCLUDE if denominator == "kept" else PULL
    options = dict(exclusion=KeepOddPlaces(action=action), denominator=denominator, min_snr_gamma=gamma)
    big, record, before = run(pipeline_folder, corpus, tmp_path, steps=3, batch_size=6, **options)
    cut, cut_record, _ = run(pipeline_folder, corpus, tmp_path, steps=3, batch_size=2, accumulate=3, **options)
    torch.testing.assert_close(weights(cut), weights(big), atol=1e-6, rtol=0)
    assert (weights(big) - before).abs().max() > 1e-4  # a hundred times the tolerance
    assert [b for w in cut_record.keys for b in w] == [b for w in record.keys for b in w]


def test_evidence_under_accumulation_decides_as_on_the_big_batch(pipeline_folder, corpus, tmp_path):
    big, record, _ = run(pipeline_folder, corpus, tmp_path, steps=8, batch_size=8, exclusion=quick_evidence())
    cut, cut_record, _ = run(
        pipeline_folder, corpus, tmp_path, steps=8, batch_size=4, accumulate=2, exclusion=quick_evidence()
    )
    assert torch.equal(torch.cat(record.kept), torch.cat(cut_record.kept))
    assert not torch.cat(record.kept).all()
    torch.testing.assert_close(weights(cut), weights(big), atol=1e-5, rtol=0)


RULES = dict(odd=KeepOddPlaces, evidence=quick_evidence)


def train_a_rank(pipeline: str, corpus: str, out: str) -> None:
    for name, rule in RULES.items():
        module = build_module(pipeline, rule(), min_snr_gamma=5.0, reference_batch=4)
        trainer = fit(module, build_data(corpus, 2), out, 6, accumulate=2, ranks=2)
        found = dict(weights=weights(module), rule=module.exclusion.state_dict(), seen=module.accumulation.samples_seen)
        if trainer.is_global_zero:
            torch.save(found, f"{out}/{name}.pt")


@pytest.fixture(scope="module")
def two_ranks(forks, pipeline_folder, corpus, tmp_path_factory):
    """What two ranks ended with, by rule."""
    out = tmp_path_factory.mktemp("ranks")
    forks.call(train_a_rank, pipeline_folder, corpus, out, log=out / "log", ranks=2)
    return {name: torch.load(out / f"{name}.pt", weights_only=True) for name in RULES}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_equal_one_process(two_ranks, pipeline_folder, corpus, tmp_path, rule):
    """min-SNR x exclusion x accumulation x 2 gloo ranks against one process with the big batch."""
    two = two_ranks[rule]
    one, record, _ = run(
        pipeline_folder, corpus, tmp_path, steps=6, batch_size=8, exclusion=RULES[rule](), min_snr_gamma=5.0
    )
    assert two["seen"] == one.accumulation.samples_seen == 48
    assert not torch.cat(record.kept).all()
    torch.testing.assert_close(two["weights"], weights(one), atol=1e-6, rtol=0)
    for name, value in one.exclusion.state_dict().items():
        torch.testing.assert_close(two["rule"][name], value, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def uninterrupted(pipeline_folder, corpus, tmp_path_factory) -> tuple:
    """A module of six steps of two micro-batches, and what it saw."""
    module, record = build_module(pipeline_folder, quick_evidence()), Record()
    fit(module, build_data(corpus), tmp_path_factory.mktemp("whole"), 6, accumulate=2, callbacks=[record])
    return module, record


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_equals_uninterrupted(uninterrupted, pipeline_folder, corpus, tmp_path, workers):
    whole, whole_record = uninterrupted
    first, rest = (build_module(pipeline_folder, quick_evidence()) for _ in range(2))
    data, record = build_data(corpus, num_workers=workers), Record()
    with pytest.raises(Killed):
        fit(first, data, tmp_path / "a", 6, 2, callbacks=[checkpoint(3, str(tmp_path / "a")), KillAt(4)])
    data = build_data(corpus, num_workers=workers)
    callbacks = [record, checkpoint(3, str(tmp_path / "a"))]
    fit(rest, data, tmp_path / "b", 6, 2, callbacks=callbacks, ckpt_path=str(tmp_path / "a" / "last.ckpt"))
    assert record.keys == whole_record.keys[8:]  # from step 4 on: a run that breaks off leaves a checkpoint
    for resumed, expected in zip(record.observed, whole_record.observed[4:], strict=True):
        assert torch.equal(resumed.loss, expected.loss) and torch.equal(resumed.score, expected.score)
    assert torch.equal(weights(rest), weights(whole))
    for a, b in zip(rest.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(a, b)
    assert rest.accumulation.samples_seen == whole.accumulation.samples_seen and rest.global_step == 6


def test_a_checkpoint_holds_no_frozen_weight_and_loads_without_pickle(pipeline_folder, corpus, tmp_path):
    module = build_module(pipeline_folder)
    fit(module, build_data(corpus), tmp_path, 2, callbacks=[checkpoint(2, str(tmp_path))])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["state_dict"] and all(name.startswith("model.unet.") for name in state["state_dict"])
    assert len(state["state_dict"]) == len(module.trained_parameters())


def test_a_trained_text_encoder_learns_and_a_frozen_one_does_not(pipeline_folder, corpus, tmp_path):
    for trained in (True, False):
        module = build_module(pipeline_folder, model={"train_text_encoder": trained})
        before = [p.detach().clone() for p in module.model.text_encoder.parameters()]
        fit(module, build_data(corpus), tmp_path, 2)
        changed = any(
            not torch.equal(a, b) for a, b in zip(before, module.model.text_encoder.parameters(), strict=True)
        )
        assert changed == trained


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precisions_train_with_a_finite_score(pipeline_folder, corpus, tmp_path, precision):
    module, record = build_module(pipeline_folder, FixedThreshold(1e9)), Record()
    fit(module, build_data(corpus), tmp_path, 2, callbacks=[record], precision=precision)
    assert all(o.score.isfinite().all() and o.score.dtype == torch.float32 for o in record.observed)
    assert weights(module).dtype == torch.float32


def test_gradient_checkpointing_changes_nothing(pipeline_folder, corpus, tmp_path):
    plain, _, _ = run(pipeline_folder, corpus, tmp_path, steps=2)
    saving, _, _ = run(pipeline_folder, corpus, tmp_path, steps=2, model={"gradient_checkpointing": True})
    torch.testing.assert_close(weights(saving), weights(plain), atol=1e-6, rtol=0)


def test_v_prediction_trains(pipelines, corpus, tmp_path):
    module, record, before = run(pipelines["v_prediction"], corpus, tmp_path, min_snr_gamma=5.0, noise_offset=0.1)
    assert module.model.noise_process.prediction_type == "v_prediction"
    assert (weights(module) - before).abs().max() > 1e-4
    assert torch.cat([observed.loss for observed in record.observed]).isfinite().all()
