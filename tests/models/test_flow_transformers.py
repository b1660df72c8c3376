"""Transformers on a rectified flow that need no unconditional prediction to draw: audits see what their stock
pipelines do."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from memtrain import detect, explain, mitigate
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.mitigate.methods import Embedding, LateGuidance
from memtrain.audit.sampling import generate
from memtrain.models.families import family_of
from tests.support.families import assert_unchanged, flux, flux2_klein, stable_diffusion, state_of
from tests.support.flows import drawn, velocity

CAPTIONS = ["fox on a teal background", "", "two-hump camel " * 20]
FEW = dict(num_images_per_prompt=2, num_inference_steps=4)
MAKE = {
    "flux dev": flux,
    "flux schnell": lambda base: flux(base, guidance_embeds=False),
    "flux.2 klein": flux2_klein,
}


@pytest.fixture(scope="module", params=MAKE)
def pipeline(request, pipeline_folder) -> DiffusionPipeline:
    return MAKE[request.param](stable_diffusion(pipeline_folder))


@pytest.fixture(scope="module", params=["flux dev", "flux.2 klein"])
def guided(request, pipeline_folder) -> DiffusionPipeline:
    """What draws with a guidance scale."""
    return MAKE[request.param](stable_diffusion(pipeline_folder))


@pytest.fixture(scope="module")
def own(pipeline) -> Denoiser:
    return Denoiser.of(pipeline)


def test_captions_and_the_null_caption_are_the_stock_pipelines(pipeline, own):
    stock = [pipeline.encode_prompt(captions, device="cpu")[:-1] for captions in (CAPTIONS, [""] * 3)]
    embedded = own.model.encode_embeds(own.model.token_embeds(CAPTIONS), CAPTIONS)
    found = own.model.encode(CAPTIONS), own.model.null(3), embedded
    for conditioning, (hidden, *pooled) in zip(found, (*stock, stock[0]), strict=True):
        torch.testing.assert_close(conditioning.hidden, hidden, atol=1e-4, rtol=1e-4)
        if pooled:
            torch.testing.assert_close(conditioning.pooled, pooled[0])


def test_scores_equal_a_plain_loop_over_the_pipelines_own_modules(pipeline, own):
    """At sigma = 1 the predictions' distance, below it that of the noises that they stand for."""
    seed, scale = generation_seeds(CAPTIONS[0], 1, 0)[0], own.model.own_guidance_scale
    found = detect(pipeline, CAPTIONS[0], num_images_per_prompt=1, num_scored_steps=3, num_inference_steps=4)
    latents, expected = own.noise([seed]), []
    timesteps = [t + 1 for t in own.model.sampler.timesteps(4)]
    for t, after in pairwise(timesteps):
        sigma = torch.tensor([t / 1000])
        with torch.no_grad():
            v, null = (velocity(pipeline, latents, sigma, [caption], scale) for caption in CAPTIONS[:2])
        factor = 1 if t == 1000 else 1 - sigma
        expected.append((factor * (v - null)).norm().item())
        latents = latents + (after - t) / 1000 * (null + own.model.guidance_weight(scale) * (v - null))
    assert timesteps[0] == 1000
    np.testing.assert_allclose(found.steps["magnitude"].reshape(-1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_path_is_the_stock_pipelines(pipeline, own, guidance_scale):
    prompts = [CAPTIONS[0], CAPTIONS[2]]
    path = generate(own, own.encode(prompts), [1, 2], 3, guidance_scale)
    torch.testing.assert_close(path, drawn(pipeline, prompts, [1, 2], 3, guidance_scale), atol=1e-4, rtol=1e-4)
    told = drawn(own.model.pipeline(), prompts, [1, 2], 3, guidance_scale)
    torch.testing.assert_close(path, told, atol=1e-4, rtol=1e-4)


def test_pictures_survive_the_way_there_and_back_as_in_the_stock_pipeline(pipeline, own):
    model, start = own.model, own.noise([1, 2])
    options = dict(num_inference_steps=2, height=16, width=16)
    told = model.to_pipeline(start)
    stock = pipeline(prompt=CAPTIONS[:2], latents=told, output_type="np", **options).images
    drawn = pipeline(prompt=CAPTIONS[:2], latents=told, output_type="latent", **options).images
    latents = model.from_pipeline(drawn, 16, 16)
    np.testing.assert_allclose(model.decode(latents) / 255, stock, atol=1 / 255)
    mean, std = model.encode_posterior(torch.from_numpy(model.decode(latents)).permute(0, 3, 1, 2))
    assert latents.shape == mean.shape == std.shape == (2, *model.own_shape)
    again = model.decode(model.sample_latents(mean, std, torch.zeros_like(std)))
    assert again.shape == (2, 16, 16, 3)


def test_a_saved_pipeline_gives_the_same_scores_and_nothing_is_changed(guided, tmp_path):
    pipeline, own = guided, Denoiser.of(guided)
    pipeline.save_pretrained(tmp_path)
    pipeline.encode_prompt("", device="cpu")  # after which transformers has hooks of its own there
    before = state_of(pipeline)
    scores, prompts = ["magnitude", "sharpness"], CAPTIONS[::2]
    found = detect(pipeline, prompts, scores=scores, **FEW)
    loaded = Denoiser.load(str(tmp_path), device="cpu")
    again = detect(loaded, prompts, scores=scores, batch_size=3, **FEW)
    for name in scores:
        np.testing.assert_allclose(found.of(name), again.of(name), atol=1e-4, rtol=1e-4)
    assert loaded.fingerprint() == own.fingerprint()
    assert detect(loaded, "", **FEW).scores == pytest.approx(0, abs=1e-5) and (found.of("magnitude") > 1e-3).all()
    assert_unchanged(pipeline, before)


def test_words_are_explained_by_a_gradient_that_a_finite_difference_confirms(guided):
    own = Denoiser.of(guided)
    found = explain(own, CAPTIONS[0], steps=(0, 1), suggest=1, **FEW)
    assert [word.text for word in found.words] == CAPTIONS[0].split()
    assert [token.text for token in found.tokens] == CAPTIONS[0].split()
    assert min(word.significance for word in found.words) > 0 and found.edits
    embeds, t = own.model.token_embeds(CAPTIONS[:1]), own.model.sampler.timesteps(4)[0]
    latents, null = own.noise([3]), own.model.null(1)

    def score(embeds):
        return own.predict_pair(latents, t, own.model.encode_embeds(embeds, CAPTIONS[:1]), null).magnitude.sum()

    (gradient,) = torch.autograd.grad(score(embeds.requires_grad_()), embeds)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (score(embeds + 1e-2 * direction) - score(embeds - 1e-2 * direction)) / 2e-2
    torch.testing.assert_close(slope, gradient.norm(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("method", [Embedding(lr=0.01, iterations=5), LateGuidance()])
def test_mitigations_draw_what_the_stock_pipeline_draws_of_what_they_changed(guided, method):
    pipeline, own = guided, Denoiser.of(guided)
    found = mitigate(pipeline, CAPTIONS[0], "0.0", method=method, guidance_scale=5.0, **FEW)
    if isinstance(method, Embedding):
        assert (found.scores_after < found.scores_before).all()
    if isinstance(method, LateGuidance):  # d of the first step is of another thing: it is no fall
        assert (found.after.guided_from >= 3).all()
        return
    made = found.after
    told = dict(prompt_embeds=made.prompt_embeds, latents=own.model.to_pipeline(made.start))
    if made.pooled_prompt_embeds is not None:
        told["pooled_prompt_embeds"] = made.pooled_prompt_embeds
    expected = drawn(pipeline, [], [1, 2], 4, 5.0, **told)
    torch.testing.assert_close(made.latents, expected, atol=1e-4, rtol=1e-4)


def test_the_guidance_that_the_network_is_told_changes_scores_where_it_is_told_one(pipeline, own):
    scales = 1.0, own.model.own_guidance_scale, None
    scores = [detect(own, CAPTIONS[0], guidance_scale=scale, **FEW).scores for scale in scales]
    assert (scores[0] == scores[1]).all() != pipeline.transformer.config.guidance_embeds
    assert (scores[1] == scores[2]).all()


def test_shift_in_training_grows_with_the_picture_as_in_sampling(pipeline, own):
    """Sigma after the stock scheduler's shift of a picture of that size."""
    for side in (8, 128):
        shape = own.latent_shape[0], side, side
        process, generators = own.model.noise_process, [torch.Generator().manual_seed(0) for _ in range(2)]
        at = process.noise_level(process.draw_timestep(generators[0], shape))
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        sigma = torch.sigmoid(torch.randn((), generator=generators[1])).item()
        scheduler.set_timesteps(sigmas=[sigma], mu=own.model._mu(shape, 50))
        assert at == pytest.approx(scheduler.sigmas[0].item(), abs=1e-3)


def test_a_network_that_cannot_be_scored_is_named(pipeline, pipeline_folder):
    own = copy.copy(pipeline)
    own.transformer = copy.deepcopy(pipeline.transformer)
    own.transformer.register_to_config(in_channels=384, out_channels=64)
    with pytest.raises(ValueError, match=r"takes a picture too \(inpainting, upscaling\)"):
        Denoiser.of(own)
    own.transformer.register_to_config(in_channels=64)
    with pytest.raises(ValueError, match=r"transformer of this .* takes 64 channels and its VAE gives \d+"):
        Denoiser.of(own)
    own.scheduler = stable_diffusion(pipeline_folder).scheduler
    own.transformer = pipeline.transformer
    with pytest.raises(ValueError, match=r"has a D.*Scheduler, which is of no rectified flow; model takes"):
        family_of(own) and Denoiser.of(own)
