"""Stable Diffusion XL, trained: what its networks are told, and that all else holds as for the first family."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline

import memtrain
from memtrain.callbacks.export import Export
from memtrain.callbacks.sample_grid import SampleGrid
from memtrain.callbacks.validation import Validation
from memtrain.core.exclusion import FixedThreshold, KeepAll
from memtrain.core.streams import Stream
from memtrain.models.base import trained_parameters
from memtrain.models.pretrained import from_pretrained
from memtrain.training.checkpoint import checkpoint
from tests.conftest import build_data, build_module, fit, weights
from tests.support import families
from tests.support.corpora import encode, sample, textured, write_tar
from tests.support.rules import quick_evidence
from tests.support.training import KillAt, Killed, Record
from tests.training.test_latent_cache import data, write

SHAPES = [(112, 65), (85, 64), (70, 131), (101, 64)]  # cut in the middle, some are not their own mirror image
CAPTIONS = ["fox on a teal background", "", "two-hump camel " * 20]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Pictures of several shapes, (width, height)."""
    folder = tmp_path_factory.mktemp("shapes") / "shards"
    parts = [sample(f"{n:03d}", encode(textured(n, SHAPES[n % 4])), f"picture {n}") for n in range(48)]
    for shard in range(3):
        write_tar(folder / f"{shard:05d}.tar", [member for part in parts[shard::3] for member in part])
    return folder


def stock(folder) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)


def batch_of(module, corpus):
    """A batch of pictures of several shapes, cut anywhere, some of them mirrored; one caption is empty."""
    loader = build_data(corpus, crop="random", flip=0.5)
    batch = loader.collate(loader.views)([(5, place, place) for place in range(4)])
    batch.captions[2] = ""
    return batch


@pytest.mark.parametrize("trains_text", [False, True])
def test_a_steps_gradient_equals_one_made_by_hand(xl_folder, corpus, trains_text):
    module = build_module(xl_folder, model={"train_text_encoder": trains_text}, caption_dropout=0.0)
    model, batch = module.model, batch_of(module, corpus)
    assert len({tuple(row) for row in batch.sizes.tolist()}) == 4
    visit = module.predictor.visit(batch, 5, Stream.TRAIN)
    loss, observed = visit.found.loss, visit.observed
    loss.sum().backward()

    pipe = stock(xl_folder)
    pipe.unet.train()
    draws = module.predictor.draw(Stream.TRAIN, 5, batch.place.tolist(), (4, 8, 8))
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        posterior = pipe.vae.encode(batch.images.float() / 127.5 - 1).latent_dist
    latents = (posterior.mean + posterior.std * draws.posterior_noise) * pipe.vae.config.scaling_factor
    noisy = scheduler.add_noise(latents, draws.noise, draws.timesteps)
    with torch.set_grad_enabled(trains_text):
        embeds = [pipe.encode_prompt(caption, device="cpu") if caption else None for caption in batch.captions]
        null = pipe.encode_prompt("a caption", device="cpu")[1::2]
        hidden = torch.cat([null[0] if one is None else one[0] for one in embeds])
        pooled = torch.cat([null[1] if one is None else one[2] for one in embeds])
    added = {"text_embeds": pooled, "time_ids": batch.sizes}
    prediction = pipe.unet(noisy, draws.timesteps, hidden, added_cond_kwargs=added).sample
    expected = (prediction - draws.noise).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected)
    expected.sum().backward()
    names = ["unet"] + ["text_encoder", "text_encoder_2"] * trains_text
    for name in names:
        by_hand = dict(getattr(pipe, name).named_parameters())
        for key, parameter in getattr(model, name).named_parameters():
            if not parameter.requires_grad:
                assert by_hand[key].grad is None, key  # what is frozen for it is not seen
                continue
            torch.testing.assert_close(parameter.grad, by_hand[key].grad, atol=1e-6, rtol=1e-4, msg=key)
    assert all(p.grad is not None for p in trained_parameters(model))  # ranks wait for none that does not come

    with torch.no_grad():  # the score: the empty caption of the stock pipeline's guidance, of the same picture
        zeros = {"text_embeds": torch.zeros_like(pooled), "time_ids": batch.sizes}
        uncond = pipe.unet(noisy, draws.timesteps, torch.zeros_like(hidden), added_cond_kwargs=zeros).sample
    score = (prediction - uncond).flatten(1).norm(dim=1)
    torch.testing.assert_close(observed.score, torch.where(observed.captioned, score, 0.0), atol=1e-5, rtol=1e-4)
    assert observed.captioned.tolist() == [True, True, False, True] and (observed.score[[0, 1, 3]] > 1e-3).all()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # what came with transformers 5.0
def test_gradient_checkpointing_changes_no_gradient(xl_folder, corpus):
    """Of either text encoder, too, whose last layer but one is looked at from outside."""
    found = []
    for saves in (False, True):
        options = {"train_text_encoder": True, "gradient_checkpointing": saves}
        module = build_module(xl_folder, model=options, caption_dropout=0.0)
        loss = module.predictor.visit(batch_of(module, corpus), 5, Stream.TRAIN).found.loss
        loss.sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in trained_parameters(module.model)]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_text_encoders_whose_class_sharding_has_changed_encode_the_same(xl_folder):
    model = from_pretrained(str(xl_folder), "auto", True, False, False, False)
    before = model.encode(CAPTIONS)
    for encoder in model.text_encoders:
        encoder.__class__ = type("Sharded", (type(encoder),), {})
    after = model.encode(CAPTIONS)
    assert torch.equal(after.hidden, before.hidden) and torch.equal(after.pooled, before.pooled)


def test_sizes_are_told_and_change_the_prediction(xl_folder, corpus):
    module = build_module(xl_folder, caption_dropout=0.0)
    batch = batch_of(module, corpus)
    with torch.no_grad():
        loss = module.predictor.visit(batch, 0, Stream.TRAIN).found.loss
        batch.sizes[1, 0] *= 3
        other = module.predictor.visit(batch, 0, Stream.TRAIN).found.loss
    assert (loss == other).tolist() == [True, False, True, True]


@pytest.mark.parametrize("is_zeros", [True, False])
def test_caption_dropout_trains_what_guidance_takes_for_the_empty_caption(pipeline_folder, is_zeros):
    base = families.stable_diffusion(pipeline_folder)
    pipe = families.stable_diffusion_xl(base, force_zeros_for_empty_prompt=is_zeros)
    model = memtrain.models.stable_diffusion_xl.StableDiffusionXL(pipe)
    told, null = model.encode_or_null(CAPTIONS), model.null(3)
    cond, uncond, pooled, no_pooled = pipe.encode_prompt(CAPTIONS, device="cpu")
    torch.testing.assert_close(told.hidden, torch.stack([cond[0], uncond[1], cond[2]]))
    torch.testing.assert_close(told.pooled, torch.stack([pooled[0], no_pooled[1], pooled[2]]))
    torch.testing.assert_close(null.hidden[1], told.hidden[1])
    assert bool((told.hidden[1] == 0).all()) == is_zeros


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_cached_training_equals_training_from_pictures(xl_folder, corpus, tmp_path, flip):
    write(xl_folder, corpus, tmp_path, flip=flip > 0)
    runs = []
    for cache in (None, str(tmp_path)):
        module, record = build_module(xl_folder), Record()
        batches = data(corpus, flip=flip, cache=cache)
        batches.check_cache(module.model.fingerprint, False)
        fit(module, batches, tmp_path / "run", 3, callbacks=[record])
        runs.append((weights(module), record))
    (plain, plain_record), (cached, cached_record) = runs
    torch.testing.assert_close(cached, plain, atol=1e-6, rtol=0)
    for one, other in zip(plain_record.window, cached_record.window, strict=True):
        assert torch.equal(one.sizes, other.sizes) and other.pooled.shape == (4, 32)
    for one, other in zip(plain_record.observed, cached_record.observed, strict=True):
        torch.testing.assert_close(one.score, other.score, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trains_text", [False, True])
def test_a_cache_of_another_family_is_refused(xl_folder, pipeline_folder, corpus, tmp_path, trains_text):
    """VAE and first text encoder are the same; what it lacks is the rest."""
    write(pipeline_folder, corpus, tmp_path)
    model = from_pretrained(str(xl_folder), "auto", trains_text, False, False, False)
    with pytest.raises(ValueError, match=r"00000\.tar\.latents.* was made with another model family.*overwrite=true"):
        data(corpus, cache=str(tmp_path)).check_cache(model.fingerprint, trains_text)


def test_a_cache_made_with_another_second_text_encoder_is_refused(xl_folder, corpus, tmp_path):
    _, model = write(xl_folder, corpus, tmp_path)
    next(model.text_encoder_2.parameters()).data.add_(1e-3)
    with pytest.raises(ValueError, match="another text encoder"):
        data(corpus, cache=str(tmp_path)).check_cache(model.fingerprint, False)


@pytest.mark.parametrize("trains_text", [False, True])
def test_what_is_trained_learns_and_is_exported(xl_folder, corpus, tmp_path, trains_text):
    module = build_module(xl_folder, quick_evidence(), model={"train_text_encoder": trains_text}, ema_decay=0)
    before = copy.deepcopy({name: getattr(module.model, name).state_dict() for name in module.model.network_names})
    looks = [Validation(2, 3, 2, 0.7, 4), SampleGrid(0, ["fox"], 1, 2, 2.0), Export("float32")]
    fit(module, build_data(corpus, crop="random", flip=0.5), tmp_path, 2, callbacks=looks)
    learnt = {"unet"} | ({"text_encoder", "text_encoder_2"} if trains_text else set())
    for name, state in before.items():
        now = getattr(module.model, name).state_dict()
        assert any(not torch.equal(now[key], state[key]) for key in state) == (name in learnt), name
    back = from_pretrained(str(tmp_path / "export"), "stable_diffusion_xl", trains_text, False, False, False)
    for (name, a), b in zip(module.model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b), name
    pipe = stock(tmp_path / "export")
    assert pipe.config.force_zeros_for_empty_prompt and len(list((tmp_path / "grids").iterdir())) == 1
    scored = [memtrain.detect(one, CAPTIONS[::2], num_images_per_prompt=1, num_scored_steps=2, num_inference_steps=4)
              for one in (module.model.pipeline(), pipe)]  # fmt: skip
    np.testing.assert_allclose(*(one.scores for one in scored), rtol=1e-6)


def test_validation_is_told_of_its_pictures_and_a_drawing_of_what_is_drawn(xl_folder, corpus, tmp_path):
    module, batches, told = build_module(xl_folder), build_data(corpus, crop="random", flip=0.5), set()
    module.model.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.update(map(tuple, kwargs["added_cond_kwargs"]["time_ids"].tolist())),
        with_kwargs=True,
    )
    looks = [Validation(9, 8, 2, 0.7, 4), SampleGrid(0, ["fox"], 1, 2, 2.0)]
    fit(module, batches, tmp_path, 1, callbacks=looks)
    assert {tuple(row) for row in batches.decode(batches.groups.reference).sizes.tolist()} <= told
    own, drawn = (tuple(map(float, (side, side, 0, 0, side, side))) for side in (module.model.own_size[0], 64))
    assert drawn in told and own not in told and own != drawn  # nothing is told what an audit would be


def test_resumed_equals_uninterrupted(xl_folder, corpus, tmp_path):
    def parts():
        options = {"train_text_encoder": True}
        return build_module(xl_folder, quick_evidence(), model=options), build_data(corpus, crop="random", flip=0.5)

    whole, batches = parts()
    fit(whole, batches, tmp_path / "whole", 4)
    first, batches = parts()
    with pytest.raises(Killed):
        fit(first, batches, tmp_path / "a", 4, callbacks=[checkpoint(2, str(tmp_path / "a")), KillAt(3)])
    rest, batches = parts()
    fit(rest, batches, tmp_path / "b", 4, callbacks=[checkpoint(9, str(tmp_path / "b"))],
        ckpt_path=str(tmp_path / "a" / "last.ckpt"))  # fmt: skip
    assert torch.equal(weights(rest), weights(whole))
    for a, b in zip(rest.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(a, b)


def test_evidence_excludes_and_an_infinite_threshold_does_not(xl_folder, corpus, tmp_path):
    rule, record = quick_evidence(), Record()
    fit(build_module(xl_folder, rule), build_data(corpus), tmp_path, 10, callbacks=[record])
    assert 0 < torch.cat(record.kept).float().mean() < 1 and rule.excluded.any()
    found = []
    for keeps in (KeepAll(), FixedThreshold(float("inf"))):
        module = build_module(xl_folder, keeps)
        fit(module, build_data(corpus), tmp_path, 2)
        found.append(weights(module))
    assert torch.equal(*found)


def train_a_rank(pipeline: str, corpus: str, out: str) -> None:
    module = build_module(pipeline, quick_evidence(), model={"train_text_encoder": True}, reference_batch=4)
    trainer = fit(module, build_data(corpus, 2, crop="random", flip=0.5), out, 3, accumulate=2, ranks=2)
    if trainer.is_global_zero:
        torch.save(weights(module), f"{out}/two.pt")


@pytest.mark.slow
def test_two_ranks_equal_one_process(forks, xl_folder, corpus, tmp_path):
    """Both text encoders are trained: a weight without a gradient would have the ranks wait for one another."""
    forks.call(train_a_rank, xl_folder, corpus, tmp_path, log=tmp_path / "log", ranks=2)
    one = build_module(xl_folder, quick_evidence(), model={"train_text_encoder": True}, reference_batch=4)
    fit(one, build_data(corpus, 8, crop="random", flip=0.5), tmp_path, 3)
    torch.testing.assert_close(torch.load(tmp_path / "two.pt", weights_only=True), weights(one), atol=1e-6, rtol=0)
