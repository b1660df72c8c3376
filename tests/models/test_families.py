"""Every family, made of a stock pipeline in hand: it does what the stock pipeline does, and leaves it as it was."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from memtrain.audit.denoiser import generation_seeds
from memtrain.core.scores import text_conditional_magnitude
from memtrain.models.conditioning import Conditioning
from memtrain.models.families import FAMILIES, family_of
from memtrain.models.flux import Flux
from memtrain.models.flux2_klein import Flux2Klein
from memtrain.models.folders import ANY, AUDITED, trained
from memtrain.models.stable_diffusion import StableDiffusion
from memtrain.models.stable_diffusion_3 import StableDiffusion3
from memtrain.models.stable_diffusion_xl import StableDiffusionXL
from tests.support.conf import CONF
from tests.support.families import assert_unchanged, stable_diffusion, stable_diffusion_xl, state_of

CAPTIONS = ["fox on a teal background", "", "two-hump camel " * 20]
MAKE = {
    "sd": lambda base: base,
    "xl": stable_diffusion_xl,
    "xl, empty caption encoded": lambda base: stable_diffusion_xl(base, force_zeros_for_empty_prompt=False),
}


@pytest.fixture(scope="module", params=MAKE)
def pipeline(request, pipeline_folder) -> DiffusionPipeline:
    return MAKE[request.param](stable_diffusion(pipeline_folder))


def model_of(pipeline):
    return family_of(pipeline).load()(pipeline)


def stock_encoding(pipeline, captions: list[str], guided: bool) -> list:
    """(cond, null, pooled cond, pooled null) of XL, else the first two."""
    return list(
        pipeline.encode_prompt(captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided)
    )


def test_captions_and_the_null_caption_are_the_stock_pipelines(pipeline):
    model = model_of(pipeline)
    encoded, null = model.encode(CAPTIONS), model.null(3)
    cond, uncond, *pooled = stock_encoding(pipeline, CAPTIONS, guided=True)
    torch.testing.assert_close(encoded.hidden, cond)
    torch.testing.assert_close(null.hidden, uncond)
    assert not encoded.hidden.requires_grad and not null.hidden.requires_grad
    for conditioning, expected in zip((encoded, null), pooled, strict=False):
        torch.testing.assert_close(conditioning.pooled, expected)
        size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        ids = pipeline._get_add_time_ids(
            (size, size), (0, 0), (size, size), torch.float32, pipeline.text_encoder_2.config.projection_dim
        )
        torch.testing.assert_close(conditioning.time_ids, ids.expand(3, -1))


def test_scores_equal_a_plain_loop_over_the_pipelines_own_modules(pipeline):
    from memtrain import detect

    steps, seed = 4, generation_seeds(CAPTIONS[0], 1, 0)[0]
    found = detect(
        pipeline, CAPTIONS[0], num_images_per_prompt=1, num_scored_steps=3, num_inference_steps=steps
    ).steps["magnitude"].reshape(-1)  # fmt: skip
    cond, uncond, *pooled = stock_encoding(pipeline, CAPTIONS[:1], guided=True)
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    added = {}
    if pooled:
        sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32).expand(2, -1)
        added = dict(added_cond_kwargs={"text_embeds": torch.cat(pooled[::-1]), "time_ids": sizes})
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps)
    side = pipeline.unet.config.sample_size
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed))
    expected = []
    with torch.no_grad():
        for t in scheduler.timesteps[:3]:
            inputs = torch.cat([latents] * 2), t, torch.cat([uncond, cond])
            null, noise = pipeline.unet(*inputs, **added).sample.chunk(2)
            expected.append((noise - null).flatten(1).norm(dim=1).item())
            latents = scheduler.step(null + 7.5 * (noise - null), t, latents).prev_sample
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_nothing_in_the_pipeline_is_changed(pipeline):
    before = state_of(pipeline)
    model = model_of(pipeline)
    conditioning, null = model.encode(CAPTIONS), model.null(3)
    latents = torch.randn(3, *model.own_shape, generator=torch.Generator().manual_seed(0))
    prediction = model.predict(latents, torch.tensor([1, 500, 999]), conditioning)
    embeds = model.token_embeds(CAPTIONS).requires_grad_()
    model.encode_embeds(embeds, CAPTIONS).hidden.sum().backward()
    pixels = model.decode(latents)
    model.encode_posterior(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    model.fingerprint()
    model.pipeline()
    assert len(null) == 3 and prediction.shape == latents.shape and pixels.shape == (3, *model.own_size, 3)
    for part in (model.network, *model.text_encoders):  # gradients are the caller's doing
        part.zero_grad()
    assert_unchanged(pipeline, before)


def test_the_vae_computes_where_it_does_not_overflow_and_is_as_it_was(pipeline_folder):
    pipeline = stable_diffusion_xl(stable_diffusion(pipeline_folder))
    pipeline.vae = copy.deepcopy(pipeline.vae).to(dtype=torch.float16)
    pipeline.vae.register_to_config(force_upcast=True)
    seen, model = [], model_of(pipeline)
    for part in (pipeline.vae.decoder, pipeline.vae.encoder):
        part.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):  # as in training at half precision
        pixels = model.decode(torch.zeros(1, *model.own_shape))
        model.encode_posterior(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert seen == [torch.float32] * 2 and pipeline.vae.dtype == torch.float16


def test_pictures_survive_the_way_there_and_back_as_in_the_stock_pipeline(pipeline):
    model = model_of(pipeline)
    latents = torch.randn(2, *model.own_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        stock = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(stock, output_type="np")
    np.testing.assert_allclose(model.decode(latents) / 255, expected, atol=1 / 255)


def test_its_pipeline_draws_what_the_stock_one_draws(pipeline):
    own = model_of(pipeline).pipeline()
    assert type(own) is type(pipeline)
    stock = type(pipeline).from_pipe(pipeline, **FAMILIES[type(pipeline).__name__].left_out)
    stock.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    stock.set_progress_bar_config(disable=True)
    drawn = [
        one(CAPTIONS[0], num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)).images
        for one in (own, stock)
    ]
    assert torch.equal(*drawn)


def test_another_score_of_the_null_caption_than_zero_is_none(pipeline):
    model = model_of(pipeline)
    latents, t = torch.randn(2, *model.own_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    with torch.no_grad():
        cond, null = (
            model.to_noise(model.predict(latents, t, conditioning), latents, t)
            for conditioning in (model.encode(CAPTIONS[::2]), model.null(2))
        )
        again = model.to_noise(model.predict(latents, t, model.null(1).expand(2)), latents, t)
    assert (text_conditional_magnitude(cond, null) > 0).all() and torch.equal(null, again)


def test_a_textual_inversion_of_several_vectors_is_several_tokens(pipeline_folder):
    pipeline = stable_diffusion(pipeline_folder)
    tokenizer = pipeline.tokenizer = copy.deepcopy(pipeline.tokenizer)
    pipeline.text_encoder = copy.deepcopy(pipeline.text_encoder)
    tokenizer.add_tokens(["<mine>", "<mine>_1"])
    pipeline.text_encoder.resize_token_embeddings(len(tokenizer))
    model = model_of(pipeline)
    learnt = tokenizer.convert_tokens_to_ids(["<mine>", "<mine>_1"])
    assert [token for token in model.tokenize(["fox <mine>"])[0].tolist() if token in learnt] == learnt
    torch.testing.assert_close(
        model.encode(["fox <mine>"]).hidden, stock_encoding(pipeline, ["fox <mine>"], guided=False)[0]
    )


def test_rows_of_what_the_network_is_told():
    conditioning = Conditioning(torch.arange(6.0).reshape(3, 2, 1), None, torch.arange(3.0).reshape(3, 1))
    picked = conditioning.index([2, 0])
    assert len(picked) == 2 and picked.pooled is None and picked.time_ids.tolist() == [[2.0], [0.0]]
    whole = Conditioning.cat([conditioning.index([0]), conditioning.index([1, 2])])
    assert torch.equal(whole.hidden, conditioning.hidden) and whole.pooled is None
    assert conditioning.index([1]).expand(4).hidden.shape == (4, 2, 1)


def test_the_table_knows_the_classes():
    classes = [StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Flux2Klein]
    assert [family.load() for family in FAMILIES.values()] == classes
    for name, family in FAMILIES.items():
        kind = family.load()
        assert kind.pipeline_class.__name__ == name
        parts = (kind.network_name, "vae", *kind.text_encoder_names, *kind.tokenizer_names, "scheduler")
        assert set(family.parts) == set(parts)
    assert set(trained(ANY).families) == set(AUDITED.families) == FAMILIES.keys()
    assert {family.choice for family in FAMILIES.values()} <= {file.stem for file in CONF.glob("model/*.yaml")}


def test_ones_own_subclass_of_a_stock_pipeline_is_of_its_family(pipeline_folder):
    pipeline = stable_diffusion(pipeline_folder)
    pipeline.__class__ = type("Mine", (type(pipeline),), {})
    assert family_of(pipeline) is FAMILIES["StableDiffusionPipeline"] and family_of(object()) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(time_cond_proj_dim=8), "is guidance-distilled and has no unconditional prediction"),
        (dict(in_channels=9), r"takes a picture too \(inpainting, upscaling\)"),
        (dict(in_channels=8, out_channels=8), "takes 8 channels and its VAE gives 4"),
    ],
)
def test_a_network_that_cannot_be_scored_is_named(pipeline_folder, change, says):
    pipeline = stable_diffusion(pipeline_folder)
    pipeline.unet.register_to_config(**change)
    with pytest.raises(ValueError, match=says):
        StableDiffusion(pipeline)


def test_a_missing_part_is_named(pipeline_folder):
    pipeline = stable_diffusion(pipeline_folder)
    pipeline.tokenizer = None
    with pytest.raises(ValueError, match="this StableDiffusionPipeline has no tokenizer"):
        StableDiffusion(pipeline)
