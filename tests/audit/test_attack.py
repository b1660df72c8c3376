"""A search for text embeddings that bring pictures back, against plain loops over the stock pipeline's modules."""

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from memtrain.audit.attack import EmbeddingSearch, search_embeddings
from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.core.diffusion import draw
from memtrain.core.streams import Stream
from tests.support.families import assert_unchanged, stable_diffusion, stable_diffusion_xl, state_of

CAPTIONS = ["fox on a teal background", "camel", "two-hump camel on a white background"]
FEW = EmbeddingSearch(steps=3, batch_size=4)


@pytest.fixture(scope="module")
def pipeline(pipelines) -> StableDiffusionPipeline:
    """One that hears its captions, untrained as it is."""
    return stable_diffusion(pipelines["epsilon"])


@pytest.fixture(scope="module")
def denoiser(pipeline) -> Denoiser:
    return Denoiser.of(pipeline)


@pytest.fixture(scope="module")
def latents(denoiser) -> torch.Tensor:
    return torch.randn(len(CAPTIONS), *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))


def rows_of(pipeline, captions, latents, seeds, step, count):
    """Timesteps and noises of one step, and the stock UNet's loss of each caption as a function of the embedding."""
    scheduler, process = DDPMScheduler.from_config(pipeline.scheduler.config), Denoiser.of(pipeline).model.noise_process
    drawn = [draw(seed, Stream.ATTACK, step, range(count), latents.shape[1:], process) for seed in seeds]

    def losses(hidden: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for n in range(len(captions)):
            clean = latents[n].expand_as(drawn[n].noise)
            noisy = scheduler.add_noise(clean, drawn[n].noise, drawn[n].timesteps)
            predicted = pipeline.unet(noisy, drawn[n].timesteps, hidden[n].expand(count, -1, -1)).sample
            found.append((predicted - drawn[n].noise).square().mean())
        return found

    return losses


def test_it_makes_the_steps_of_a_plain_loop(denoiser, pipeline, latents):
    """Adam by hand, with gradients of the stock UNet's mean squared error."""
    found = search_embeddings(denoiser, latents, CAPTIONS, FEW, seed=5)
    seeds = [generation_seeds(caption, 1, 5, Stream.ATTACK)[0] for caption in CAPTIONS]
    own = denoiser.encode(CAPTIONS).hidden
    free, mean, square = own[:, 1:].clone(), 0.0, 0.0
    for step in range(FEW.steps):
        losses = rows_of(pipeline, CAPTIONS, latents, seeds, step, FEW.batch_size)
        free.requires_grad_(True)
        total = sum(losses(torch.cat([own[:, :1], free], dim=1)))
        (gradient,) = torch.autograd.grad(total, free)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient.square()
        n = step + 1
        free = free.detach() - 0.1 * (mean / (1 - 0.9**n)) / ((square / (1 - 0.999**n)).sqrt() + 1e-8)
    assert (free - own[:, 1:]).abs().mean() > 0.1  # it has gone somewhere
    torch.testing.assert_close(found.hidden[:, 1:], free, rtol=1e-3, atol=2e-3)
    assert torch.equal(found.hidden[:, 0], own[:, 0])  # BOS


def test_what_is_found_is_denoised_better_and_nothing_of_the_model_changes(pipeline, latents):
    """At noises and timesteps that the search never saw; an untrained model knows nothing, and can be talked to yet."""
    before, told = state_of(pipeline), []
    found = search_embeddings(
        Denoiser.of(pipeline), latents, CAPTIONS, EmbeddingSearch(steps=5), advance=lambda *said: told.append(said)
    )
    assert_unchanged(pipeline, before)
    with torch.no_grad():
        losses = rows_of(pipeline, CAPTIONS, latents, [11, 12, 13], 0, 32)
        own, after = losses(Denoiser.of(pipeline).encode(CAPTIONS).hidden), losses(found.hidden)
    assert all(less < more for less, more in zip(after, own, strict=True)), (after, own)
    assert told[-1] == (15, 15) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_suspect_is_searched_alike_in_any_company(denoiser, latents):
    """Alone, with others, in another order, in batches that end in the midst of its draws."""
    found = search_embeddings(denoiser, latents, CAPTIONS, FEW, batches=ShrinkingBatches(12)).hidden
    for order, batch_size in (([0, 1, 2], 3), ([2, 0], 16), ([1], 1)):
        captions = [CAPTIONS[n] for n in order]
        again = search_embeddings(denoiser, latents[order], captions, FEW, batches=ShrinkingBatches(batch_size))
        torch.testing.assert_close(again.hidden, found[order], rtol=1e-3, atol=2e-3)
    other = search_embeddings(denoiser, latents, CAPTIONS, FEW, seed=1).hidden
    assert not torch.allclose(other, found, atol=0.05)


def test_a_pooled_embedding_stays_and_memory_that_runs_out_halves_the_batch(pipeline_folder, monkeypatch):
    denoiser = Denoiser.of(stable_diffusion_xl(stable_diffusion(pipeline_folder)).to(torch.bfloat16))
    rows, predict = [], denoiser.model.predict

    def predict_few(noisy_latents, timesteps, conditioning):
        rows.append(len(noisy_latents))
        if len(noisy_latents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return predict(noisy_latents, timesteps, conditioning)

    monkeypatch.setattr(denoiser.model, "predict", predict_few)
    latents = torch.randn(2, *denoiser.latent_shape)
    found = search_embeddings(denoiser, latents, CAPTIONS[:2], EmbeddingSearch(steps=2, batch_size=4))
    own = denoiser.encode(CAPTIONS[:2])
    assert rows == [8, 4, *[2] * 8]
    assert torch.equal(found.pooled, own.pooled) and torch.equal(found.time_ids, own.time_ids)
    assert found.hidden.dtype == torch.bfloat16 and (found.hidden[:, 1:] != own.hidden[:, 1:]).any()


@pytest.mark.parametrize("name", ["steps", "lr", "batch_size"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=rf"attack\.{name} must be >=? [01], got 0; attack=none"):
        EmbeddingSearch(**{name: 0})


def test_an_embedding_that_is_not_finite_is_said(denoiser, latents):
    with pytest.raises(ValueError, match=r"not finite after 3 Adam steps at 0\.1.*; take dtype=float32"):
        search_embeddings(denoiser, latents * float("inf"), CAPTIONS, FEW)
