"""What is scored is what the stock pipeline predicts."""

import copy
import logging

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import AsTrained, Denoiser, generation_seeds
from memtrain.audit.detect.attention import cross_attention, end_positions
from memtrain.audit.sampling import SamplingPath, generate
from tests.audit.conftest import PROMPTS
from tests.support.families import stable_diffusion


def seeds_of(prompts: list[str]) -> list[int]:
    return [generation_seeds(prompt, 1, 0)[0] for prompt in prompts]


def stock_predictions(pipeline, prompts, latents, num_inference_steps, guidance_scale):
    """Pairs (null, cond) that the UNet gives inside the stock pipeline, and the latents it ends with."""
    seen = []
    hook = pipeline.unet.register_forward_hook(lambda module, inputs, output: seen.append(output[0].chunk(2)))
    end = pipeline(
        prompts,
        latents=latents,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    hook.remove()
    return seen, end


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_without_guidance_the_caption_is_drawn_as_the_stock_pipeline_does(denoiser, stock, guidance_scale):
    latents = denoiser.noise(seeds_of(PROMPTS))
    options = dict(num_inference_steps=3, guidance_scale=guidance_scale, output_type="latent")
    expected = stock(list(PROMPTS), latents=latents, **options).images
    drawn = generate(denoiser, denoiser.encode(PROMPTS), seeds_of(PROMPTS), 3, guidance_scale)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.5, 7.5])
def test_predictions_and_path_are_the_stock_pipelines(denoiser, stock, guidance_scale):
    latents = denoiser.noise(seeds_of(PROMPTS))
    expected, end = stock_predictions(stock, PROMPTS, latents, 4, guidance_scale)
    cond, null = denoiser.encode(PROMPTS), denoiser.model.null(len(PROMPTS))
    timesteps = denoiser.model.sampler.timesteps(4)
    for index, (stock_null, stock_cond) in enumerate(expected):
        with torch.no_grad():
            predicted = denoiser.predict_pair(latents, timesteps[index], cond, null)
        torch.testing.assert_close(predicted.noise_cond, stock_cond, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(predicted.noise_null, stock_null, atol=1e-4, rtol=1e-4)
        latents = denoiser.model.sampler.step(latents, timesteps, index, predicted, guidance_scale)
    torch.testing.assert_close(latents, end, atol=1e-4, rtol=1e-4)
    assert torch.equal(latents, generate(denoiser, cond, seeds_of(PROMPTS), 4, guidance_scale))


def test_what_was_trained_at_another_size_is_drawn_at_it(pipeline_folder, stock, xl_pipeline):
    larger = Denoiser.load(str(pipeline_folder), "cpu", as_trained=AsTrained(resolution=128))
    latents = larger.noise(seeds_of(PROMPTS))
    options = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent", height=128, width=128)
    expected = stock(list(PROMPTS), latents=latents, **options).images
    drawn = generate(larger, larger.encode(PROMPTS), seeds_of(PROMPTS), 2, 3.0)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    assert larger.model.decode(drawn).shape == (len(PROMPTS), 128, 128, 3)
    assert larger.fingerprint() != Denoiser.load(str(pipeline_folder), "cpu").fingerprint()
    xl = Denoiser.of(xl_pipeline).model
    xl.null(1)
    AsTrained(resolution=128).tell(xl)
    for told in (xl.encode(["fox"]), xl.null(1)):
        assert told.time_ids.tolist() == [[128, 128, 0, 0, 128, 128]]
    with pytest.raises(ValueError, match=r"^resolution must be a multiple of"):
        Denoiser.load(str(pipeline_folder), "cpu", as_trained=AsTrained(resolution=100))


def test_from_zero_signal_the_path_is_the_stock_pipelines_and_v_itself_is_compared(pipelines):
    """Zero terminal SNR: the first noise is x_T whatever v is predicted."""
    own = stable_diffusion(pipelines["v_prediction"])
    own.scheduler.register_to_config(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    own.scheduler = DDIMScheduler.from_config(own.scheduler.config, clip_sample=False)
    found, latents = Denoiser.of(own), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, end = stock_predictions(own, PROMPTS, latents, 4, 7.5)
    path = SamplingPath(found, latents, found.encode(PROMPTS), 7.5, 4)
    with torch.no_grad():
        steps = list(path)
    assert steps[0].t == 999 and found.model.noise_process.alphas_cumprod[999] == 0
    torch.testing.assert_close(path.latents, end, atol=1e-4, rtol=1e-4)
    for step, (null, cond) in zip(steps, expected, strict=True):
        alpha = found.model.noise_process.alphas_cumprod[step.t]
        factor = 1 if step.index == 0 else alpha.sqrt()
        torch.testing.assert_close(
            step.predicted.magnitude, factor * (cond - null).flatten(1).norm(dim=1), atol=1e-4, rtol=1e-3
        )


def test_a_noise_that_tells_of_no_picture_is_refused(pipeline_folder):
    own = stable_diffusion(pipeline_folder)
    own.scheduler.register_to_config(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"starts from zero signal .*tells of no picture"):
        Denoiser.of(own)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_noise_that_is_not_ddpms_is_refused(pipeline_folder, scheduler):
    own = stable_diffusion(pipeline_folder)
    own.scheduler = scheduler()
    with pytest.raises(ValueError, match=rf"no noise of DDPM's: its scheduler is a {scheduler.__name__}"):
        Denoiser.of(own)


def test_a_vae_with_a_mean_of_its_own_is_refused(pipeline_folder):
    own = stable_diffusion(pipeline_folder)
    own.vae.register_to_config(latents_mean=[0.1] * 4)
    with pytest.raises(ValueError, match="shifts its latents"):
        Denoiser.of(own)


def test_sdxl_predictions_are_the_stock_pipelines(xl_pipeline):
    xl = Denoiser.of(xl_pipeline)
    latents = xl.noise(seeds_of(PROMPTS))
    expected, end = stock_predictions(xl_pipeline, PROMPTS, latents, 2, 5.0)
    with torch.no_grad():
        first = xl.model.sampler.timesteps(2)[0]
        pair = xl.predict_pair(latents, first, xl.encode(PROMPTS), xl.model.null(3))
    torch.testing.assert_close(pair.noise_cond, expected[0][1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pair.noise_null, expected[0][0], atol=1e-4, rtol=1e-4)
    drawn = generate(xl, xl.encode(PROMPTS), seeds_of(PROMPTS), 2, 5.0)
    torch.testing.assert_close(drawn, end, atol=1e-4, rtol=1e-4)
    assert xl.model.decode(end).shape == (3, 32, 32, 3)


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_token_embeddings_give_what_tokens_give_with_a_gradient(denoiser, xl_pipeline, family):
    own = denoiser if family == "sd" else Denoiser.of(xl_pipeline)
    embeds = own.model.token_embeds(PROMPTS).requires_grad_()
    encoded, expected = own.model.encode_embeds(embeds, PROMPTS), own.encode(PROMPTS)
    torch.testing.assert_close(encoded.hidden, expected.hidden)
    total = encoded.hidden.square().sum()
    if family == "xl":
        torch.testing.assert_close(encoded.pooled, expected.pooled)
        total = total + encoded.pooled.square().sum()
    (gradient,) = torch.autograd.grad(total, embeds)
    assert gradient.abs().sum() > 0
    assert not own.model.text_encoder.get_input_embeddings()._forward_hooks
    with pytest.raises(ValueError, match="B = 3 prompts"):
        own.model.encode_embeds(embeds[:2], PROMPTS)


def test_attention_is_read_without_a_trace(denoiser):
    unet = denoiser.model.unet
    before, processors = copy.copy(unet.__dict__), dict(unet.attn_processors)
    latents, cond, null = denoiser.noise([1, 2]), denoiser.encode(PROMPTS[:2]), denoiser.model.null(2)
    ends = end_positions(denoiser.model.tokenize(PROMPTS[:2]), denoiser.model.tokenizer.eos_token_id)
    with torch.no_grad():
        plain = denoiser.predict_pair(latents, 500, cond, null)
        with cross_attention(unet, ends) as seen:
            watched = denoiser.predict_pair(latents, 500, cond, null)
    assert torch.equal(plain.cond, watched.cond) and torch.equal(plain.null, watched.null)
    torch.testing.assert_close(seen.token_means().sum(dim=1), torch.ones(2))  # probabilities
    end_map = seen.end_map(8, 8)
    assert end_map.shape == (2, 8, 8) and (end_map > 0).all() and (end_map < 1).all()
    assert unet.__dict__.keys() == before.keys() and dict(unet.attn_processors) == processors
    assert not any(module._forward_hooks for module in unet.modules())


def test_end_of_text_is_the_first_one(denoiser):
    ids = denoiser.model.tokenize(["fox", "", "fox " * 99])
    places = end_positions(ids, denoiser.model.tokenizer.eos_token_id)
    assert places.tolist() == [len(denoiser.model.tokenizer("fox").input_ids) - 1, 1, ids.shape[1] - 1]


def test_hooks_are_gone_after_an_error(denoiser):
    with (
        pytest.raises(RuntimeError, match="stopped"),
        cross_attention(denoiser.model.unet, torch.tensor([1])),
    ):
        raise RuntimeError("stopped")
    assert not any(module._forward_hooks for module in denoiser.model.unet.modules())


def test_noise_of_a_row_does_not_depend_on_its_batch(denoiser):
    assert torch.equal(denoiser.noise([5, 6, 7])[1], denoiser.noise([6])[0])
    assert generation_seeds("fox", 4, 0)[:2] == generation_seeds("fox", 2, 0)
    assert set(generation_seeds("fox", 4, 0)).isdisjoint(generation_seeds("cat", 4, 0))


def test_fingerprint_tells_weights_apart(denoiser, pipeline):
    changed = copy.deepcopy(pipeline)
    assert Denoiser.of(changed).fingerprint() == denoiser.fingerprint()
    with torch.no_grad():
        next(changed.unet.parameters()).view(-1)[0] += 1e-3
    assert Denoiser.of(changed).fingerprint() != denoiser.fingerprint()
    leading = Denoiser.of(changed).fingerprint()
    changed.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    assert Denoiser.of(changed).fingerprint() != leading


def test_out_of_memory_halves_the_batch_and_goes_on(caplog):
    sizes = []

    def work(rows: range) -> list[int]:
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(len(rows))
        return list(rows)

    batches = ShrinkingBatches(8)
    with caplog.at_level(logging.WARNING):
        found = [row for part in batches.over(9, work) for row in part]
    assert found == list(range(9)) and max(sizes) == 2 and batches.batch_size == 2
    assert "out of memory with 8 rows at a time; going on with 4" in caplog.text
    with pytest.raises(RuntimeError, match="something else"):
        list(batches.over(4, lambda rows: (_ for _ in ()).throw(RuntimeError("something else"))))
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        ShrinkingBatches(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: folder.joinpath("model_index.json").unlink(), "has no model_index.json"),
        (lambda folder: folder.joinpath("unet").rename(folder / "other"), "has no unet/"),
        (
            lambda folder: folder.joinpath("model_index.json").write_text('{"_class_name": "Flux"}'),
            "is a Flux",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(pipeline_folder, tmp_path, change, message):
    import shutil

    folder = shutil.copytree(pipeline_folder, tmp_path / "model")
    change(folder)
    with pytest.raises(ValueError, match=f"model=.*{message}.*; model takes a Stable Diffusion") as raised:
        Denoiser.load(str(folder))
    assert "\n" not in str(raised.value)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model=/nowhere/model: no such folder"):
        Denoiser.load("/nowhere/model")
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got int8"):
        Denoiser.load("/nowhere/model", dtype="int8")
