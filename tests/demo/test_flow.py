"""The package's tiny Stable Diffusion 3: small, stock, and it has learnt pictures and captions."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from memtrain.demo import FLOW
from memtrain.demo.compose import Composites
from memtrain.demo.make_flow import UNSEEN
from memtrain.models.stable_diffusion_3 import StableDiffusion3

PICTURES, SIGMAS = 24, (0.2, 0.4, 0.6, 0.8)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    options = dict(text_encoder_3=None, tokenizer_3=None, local_files_only=True, dtype=torch.float32)
    pipeline = StableDiffusion3Pipeline.from_pretrained(FLOW, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_small_and_the_stock_pipeline_draws_with_it(pipeline):
    assert sum(file.stat().st_size for file in FLOW.rglob("*") if file.is_file()) <= 12e6
    drawn = pipeline("fox on a teal background", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert drawn.images[0].size == (64, 64)


@torch.no_grad()
def test_it_has_learnt_pictures_and_captions(pipeline):
    """On pictures that it never saw: its error lies far below that of the best linear guess, and is lower with the
    caption than with another picture's or none."""
    composites = [Composites(0)[UNSEEN + place] for place in range(PICTURES)]
    captions = [composite.caption for composite in composites]
    model = StableDiffusion3(pipeline)
    images = torch.stack([torch.from_numpy(composite.image).permute(2, 0, 1) for composite in composites])
    mean, std = model.encode_posterior(images)
    latents = model.sample_latents(mean, std, torch.zeros_like(std))
    assert latents.mean().abs() < 0.1 and latents.std() == pytest.approx(1, abs=0.1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    model.make_trainable(False, False, False, False)  # one zero token for 256: a quarter of the time
    told = {name: model.encode(said) for name, said in (("own", captions), ("other", captions[1:] + captions[:1]))}
    told["none"] = model.null(PICTURES)
    errors = {name: [] for name in (*told, "linear")}
    for sigma in SIGMAS:
        timesteps = torch.full((PICTURES,), round(1000 * sigma) - 1)
        noisy, velocity = model.noise_process.add_noise(latents, noise, timesteps), noise - latents
        for name, conditioning in told.items():
            errors[name].append((model.predict(noisy, timesteps, conditioning) - velocity).square().mean())
        slope = (2 * sigma - 1) / (sigma**2 + (1 - sigma) ** 2)  # least squares, white latents of variance 1
        errors["linear"].append((slope * noisy - velocity).square().mean())
    loss = {name: torch.stack(values).mean().item() for name, values in errors.items()}
    assert loss["own"] < 0.25 * loss["linear"], loss
    assert loss["own"] < 0.95 * loss["none"] and loss["none"] < loss["other"], loss
