"""One zero token, counted 256 times, in place of 256: predictions and gradients are the stock transformer's."""

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel

from memtrain.models.conditioning import Conditioning
from memtrain.models.stable_diffusion_3 import T5_TOKENS, StableDiffusion3
from tests.support.adapters import low_rank
from tests.support.families import stable_diffusion, stable_diffusion_3

LATENTS, TIMESTEPS = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 500, 999])
CAPTIONS = ["fox on a teal background", "", "two-hump camel " * 20]


@pytest.fixture(params=[{}, dict(qk_norm="rms_norm", dual_attention_layers=(0,))], ids=["3", "3.5"])
def pipeline(request, pipeline_folder):
    """Of both kinds of transformer; all their weights count."""
    found = stable_diffusion_3(stable_diffusion(pipeline_folder))
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(**{**found.transformer.config, **request.param})
    for weight in transformer.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.1)
    found.transformer = transformer
    return found


def stock(transformer, told: Conditioning) -> torch.Tensor:
    return transformer(
        hidden_states=LATENTS,
        timestep=TIMESTEPS.float() + 1,
        encoder_hidden_states=told.hidden,
        pooled_projections=told.pooled,
    ).sample


def lengths_seen(model: StableDiffusion3) -> list[int]:
    """Text tokens of each forward from now on."""
    seen: list[int] = []
    model.transformer.context_embedder.register_forward_hook(lambda _, given, out: seen.append(out.shape[1]))
    return seen


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_predictions_and_gradients_are_those_of_all_the_zeros(pipeline, gradient_checkpointing):
    expected = copy.deepcopy(pipeline.transformer)
    model = StableDiffusion3(pipeline)
    model.make_trainable(False, gradient_checkpointing, channels_last=False, compile=False)
    told, seen = model.encode(CAPTIONS), lengths_seen(model)
    assert told.hidden.shape[1] == 24 + T5_TOKENS
    predicted = model.predict(LATENTS, TIMESTEPS, told)
    assert seen == [24 + 1]
    torch.testing.assert_close(predicted, stock(expected, told), atol=1e-5, rtol=1e-5)
    predicted.square().mean().backward()
    stock(expected, told).square().mean().backward()
    for ours, theirs in zip(model.transformer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4 * theirs.grad.abs().max().item(), rtol=0)


def test_the_stock_pipeline_over_the_trained_weights_draws_the_same(pipeline, tmp_path):
    model = StableDiffusion3(copy.deepcopy(pipeline))
    model.make_trainable(False, gradient_checkpointing=False, channels_last=False, compile=False)
    seen, options = lengths_seen(model), dict(num_inference_steps=2, latents=LATENTS, output_type="latent")
    drawn = model.pipeline()(CAPTIONS, **options).images
    assert seen == [24 + 1] * 2
    torch.testing.assert_close(drawn, pipeline(CAPTIONS, **options).images, atol=1e-4, rtol=1e-4)


def test_tokens_that_may_come_to_differ_are_all_there(pipeline):
    """Noise on the embeddings, a gradient of their own, an adapter's dropout."""
    expected = copy.deepcopy(pipeline.transformer)
    model = StableDiffusion3(pipeline)
    model.make_trainable(False, gradient_checkpointing=False, channels_last=False, compile=False)
    told, seen = model.encode(CAPTIONS), lengths_seen(model)
    noisy = told.map(lambda part: part + 0.1 * torch.randn_like(part))
    with torch.no_grad():
        torch.testing.assert_close(model.predict(LATENTS, TIMESTEPS, noisy), stock(expected, noisy))
    model.predict(LATENTS, TIMESTEPS, told.map(lambda part: part.clone().requires_grad_()))
    low_rank(dropout=0.5).attach(model, seed=0)
    model.predict(LATENTS, TIMESTEPS, told)
    assert seen == [24 + T5_TOKENS] * 3
    model.train(False)
    model.transformer.eval()
    model.predict(LATENTS, TIMESTEPS, told)
    assert seen[-1] == 24 + 1
