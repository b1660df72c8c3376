"""Stable Diffusion 3, with and without a T5: audits see what the stock pipeline does, on a rectified flow."""

import copy

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from memtrain import detect, explain, mitigate
from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.margin import CaptionMargin
from memtrain.audit.mitigate.comparison import Comparison, Judges
from memtrain.audit.mitigate.methods import Embedding, InitialNoise, LateGuidance, RandomNumbers
from memtrain.audit.mitigate.mitigation import Sampling
from memtrain.audit.sampling import generate
from memtrain.models.stable_diffusion_3 import StableDiffusion3
from tests.support.families import assert_unchanged, stable_diffusion, stable_diffusion_3, state_of

CAPTIONS = ["fox on a teal background", "", "two-hump camel " * 20]
FEW = dict(num_images_per_prompt=2, num_inference_steps=4)


@pytest.fixture(scope="module", params=[False, True], ids=["clip", "t5"])
def pipeline(request, pipeline_folder) -> StableDiffusion3Pipeline:
    return stable_diffusion_3(stable_diffusion(pipeline_folder), t5=request.param)


@pytest.fixture(scope="module")
def clip_only(pipeline_folder) -> StableDiffusion3Pipeline:
    return stable_diffusion_3(stable_diffusion(pipeline_folder))


def start(seeds: list[int]) -> torch.Tensor:
    return torch.stack([torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def test_captions_and_the_null_caption_are_the_stock_pipelines(pipeline):
    model = StableDiffusion3(pipeline)
    encoded, null = model.encode(CAPTIONS), model.null(3)
    cond, uncond, pooled, null_pooled = pipeline.encode_prompt(CAPTIONS, None, None, device="cpu")
    torch.testing.assert_close(encoded.hidden, cond, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoded.pooled, pooled)
    torch.testing.assert_close(null.hidden, uncond)
    torch.testing.assert_close(null.pooled, null_pooled)
    embedded = model.encode_embeds(model.token_embeds(CAPTIONS), CAPTIONS)
    torch.testing.assert_close(embedded.hidden, cond, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(embedded.pooled, pooled)


def test_a_t5_is_told_as_many_tokens_as_the_stock_pipelines_call_says(pipeline_folder):
    pipeline = stable_diffusion_3(stable_diffusion(pipeline_folder), t5=True)
    model = StableDiffusion3(pipeline)
    whole = model.encode(CAPTIONS).hidden
    model.cut_captions(9)
    cond, uncond, *_ = pipeline.encode_prompt(CAPTIONS, None, None, device="cpu", max_sequence_length=9)
    torch.testing.assert_close(model.encode(CAPTIONS).hidden, cond)
    torch.testing.assert_close(model.null(3).hidden, uncond)
    assert model.call_options == {"max_sequence_length": 9}
    clip = pipeline.tokenizer.model_max_length
    # cutting rows off is no way there: what stands for padding is seen by the tokens before it, and differs by place
    assert not torch.allclose(whole[0, clip : clip + 9], cond[0, clip:], atol=1e-3)
    padding = whole[0, clip + 6 :]
    assert (padding - padding[0])[1:].norm(dim=1).min() > 1e-3
    with pytest.raises(ValueError, match=r"max_sequence_length must be in \[1, 512\], got 513"):
        model.cut_captions(513)
    with pytest.raises(ValueError, match="max_sequence_length=9 is for Stable Diffusion 3 with a T5, which this"):
        StableDiffusion3(stable_diffusion_3(stable_diffusion(pipeline_folder))).cut_captions(9)


def test_scores_equal_a_plain_loop_over_the_pipelines_own_modules(pipeline):
    """At sigma = 1 the predictions' distance, below it that of the noises that they stand for."""
    seed = generation_seeds(CAPTIONS[0], 1, 0)[0]
    options = dict(num_images_per_prompt=1, num_scored_steps=3, num_inference_steps=4)
    found = detect(pipeline, CAPTIONS[0], scores=["magnitude", "sharpness"], **options)
    cond, uncond, *pooled = pipeline.encode_prompt(CAPTIONS[:1], None, None, device="cpu")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    latents, expected = start([seed]), []

    @torch.no_grad()
    def predict(latents, t):
        told = dict(encoder_hidden_states=torch.cat([uncond, cond]), pooled_projections=torch.cat(pooled[::-1]))
        return pipeline.transformer(torch.cat([latents] * 2), timestep=t.expand(2), **told).sample.chunk(2)

    for t, sigma in zip(scheduler.timesteps[:3], scheduler.sigmas[:3], strict=True):
        factor = 1 if sigma == 1 else 1 - sigma
        null, v = predict(latents, t)
        moved = latents + 0.1 * factor * (null - v) / sigma
        other_null, other = predict(moved, t)
        sharpness = factor / sigma * ((other_null - other) - (null - v)).norm()
        expected.append([(factor * (v - null)).norm().item(), sharpness.item()])
        latents = scheduler.step(null + 7.5 * (v - null), t, latents).prev_sample
    assert found.timesteps[0] == 999 and scheduler.sigmas[0] == 1
    for name, values in zip(("magnitude", "sharpness"), np.transpose(expected), strict=True):
        np.testing.assert_allclose(found.steps[name].reshape(-1), values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "guidance_scale"),
    [
        (dict(shift=3.0), 1.5),
        (dict(shift=1.0, use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=64), 7.0),
        (dict(shift=1.0, use_karras_sigmas=True), 7.0),
    ],
    ids=["shift", "dynamic", "karras"],
)
def test_the_path_is_the_stock_pipelines(clip_only, scheduler, guidance_scale):
    pipeline = copy.copy(clip_only)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler)
    prompts = [CAPTIONS[0], CAPTIONS[2]]
    own = Denoiser.of(pipeline)
    drawn = generate(own, own.encode(prompts), [1, 2], 5, guidance_scale)
    options = dict(num_inference_steps=5, guidance_scale=guidance_scale, output_type="latent")
    expected = pipeline(prompts, latents=start([1, 2]), **options).images
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    told = own.model.pipeline()(prompts, latents=start([1, 2]), **options).images
    assert torch.equal(told, expected)


def test_pictures_survive_the_way_there_and_back_as_in_the_stock_pipeline(clip_only):
    model, vae = StableDiffusion3(clip_only), clip_only.vae
    latents = start([1, 2])
    with torch.no_grad():
        stock = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        pixels = clip_only.image_processor.postprocess(stock, output_type="np")
        decoded = model.decode(latents)
        posterior = vae.encode(torch.from_numpy(decoded).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    np.testing.assert_allclose(decoded / 255, pixels, atol=1 / 255)
    mean, std = model.encode_posterior(torch.from_numpy(decoded).permute(0, 3, 1, 2))
    expected = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(model.sample_latents(mean, std, torch.zeros_like(std)), expected)


def test_a_saved_pipeline_gives_the_same_scores_and_nothing_is_changed(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    before = state_of(pipeline)
    scores = ["magnitude", "anisotropy", "sharpness", "tiled_l2"]
    prompts = CAPTIONS[::2]
    found = detect(pipeline, prompts, scores=scores, **FEW)
    own = Denoiser.load(str(tmp_path), device="cpu")
    again = detect(own, prompts, scores=scores, batch_size=3, **FEW)
    for name in scores:
        np.testing.assert_allclose(found.of(name), again.of(name), atol=1e-5, rtol=1e-5)
    assert own.fingerprint() == Denoiser.of(pipeline).fingerprint()
    assert detect(own, "", **FEW).scores == pytest.approx(0, abs=1e-5) and (found.of("magnitude") > 1e-3).all()
    assert_unchanged(pipeline, before)


def test_the_schedule_is_part_of_what_scores_depend_on(clip_only):
    pipeline = copy.copy(clip_only)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert Denoiser.of(pipeline).fingerprint() != Denoiser.of(clip_only).fingerprint()


def test_words_are_explained_by_a_gradient_that_a_finite_difference_confirms(clip_only):
    own = Denoiser.of(copy.copy(clip_only))
    found = explain(own, CAPTIONS[0], steps=(0, 1), suggest=1, **FEW)
    assert len(found.words) == 5 and min(word.significance for word in found.words) > 0 and found.edits
    embeds, t = own.model.token_embeds(CAPTIONS[:1]), own.model.sampler.timesteps(4)[0]
    latents, null = start([3]), own.model.null(1)

    def score(embeds):
        return own.predict_pair(latents, t, own.model.encode_embeds(embeds, CAPTIONS[:1]), null).magnitude.sum()

    (gradient,) = torch.autograd.grad(score(embeds.requires_grad_()), embeds)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (score(embeds + 1e-2 * direction) - score(embeds - 1e-2 * direction)) / 2e-2
    torch.testing.assert_close(slope, gradient.norm(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("method", [Embedding(lr=0.01), InitialNoise(iterations=2), LateGuidance(), RandomNumbers()])
def test_mitigations_draw_what_the_stock_pipeline_draws_of_what_they_changed(clip_only, method):
    found = mitigate(clip_only, CAPTIONS[0], "0.0", method=method, guidance_scale=5.0, **FEW)
    if isinstance(method, Embedding):
        assert (found.scores_after < found.scores_before).all()
    if isinstance(method, LateGuidance):  # d of the first step is of another thing: it is no fall
        assert (found.after.guided_from >= 3).all()
        return
    expected = clip_only(
        prompt_embeds=found.after.prompt_embeds,
        pooled_prompt_embeds=found.after.pooled_prompt_embeds,
        negative_prompt_embeds=Denoiser.of(clip_only).model.null(2).hidden,
        negative_pooled_prompt_embeds=Denoiser.of(clip_only).model.null(2).pooled,
        latents=found.after.start,
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(found.after.latents, expected, atol=1e-4, rtol=1e-4)


def test_a_judge_of_another_size_is_refused(clip_only, pipeline_folder):
    smaller = stable_diffusion(pipeline_folder)
    smaller.unet.register_to_config(sample_size=4)
    judges = Judges(originals=None, judge=Denoiser.of(smaller), clip=None)
    with pytest.raises(ValueError, match="judge draws 32 x 32 px and the model 64 x 64"):
        Comparison(Denoiser.of(clip_only), CAPTIONS[:1], 1, Sampling(2), judges)
    with pytest.raises(ValueError, match="judge draws 32 x 32 px and the model 64 x 64"):
        CaptionMargin(Denoiser.of(smaller), ShrinkingBatches(2)).check(Denoiser.of(clip_only))


@pytest.mark.parametrize("score", ["attention_entropy", "bright_ending"])
def test_scores_that_look_at_cross_attention_are_refused_before_anything_is_drawn(clip_only, monkeypatch, score):
    monkeypatch.setattr(clip_only.transformer, "forward", lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match="a SD3Transformer2DModel has no cross-attention; leave") as raised:
        detect(clip_only, CAPTIONS, scores=["magnitude", score])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("transformer", dict(in_channels=17), r"takes a picture too \(inpainting, upscaling\)"),
        ("vae", dict(latent_channels=4), "takes 16 channels and its VAE gives 4"),
    ],
)
def test_a_network_that_cannot_be_scored_is_named(pipeline_folder, part, change, says):
    own = stable_diffusion_3(stable_diffusion(pipeline_folder))
    getattr(own, part).register_to_config(**change)
    with pytest.raises(ValueError, match=f"of this StableDiffusion3Pipeline {says}|StableDiffusion3Pipeline {says}"):
        Denoiser.of(own)


def test_a_scheduler_of_another_process_is_refused(clip_only, pipeline_folder):
    pipeline = copy.copy(clip_only)
    pipeline.scheduler = stable_diffusion(pipeline_folder).scheduler
    with pytest.raises(ValueError, match=r"has a D.*Scheduler, which is of no rectified flow; model takes"):
        Denoiser.of(pipeline)
