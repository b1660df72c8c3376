"""Is a picture gone from a finished model, or hidden in it? An attack searches what brings it back.

A model that has learnt not to answer a caption may still hold its picture: then another text embedding, which no
words need to give, brings it back. A model that never learnt the picture resists, as far as the search is weak enough
not to describe the picture by itself; never-trained pictures, attacked as well, say how far that is.

Shapes: N suspects, S of them searched at a time, R draws of noise and timestep in a step, B rows of one forward, L
tokens, D width of the text embedding, C x H x W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.core.diffusion import Draws, draw
from memtrain.core.streams import Stream
from memtrain.models.conditioning import Conditioning


@dataclass(frozen=True)
class Attack:
    """No attack: a model is judged by what its captions bring back.

    Subclass this and name the class in the config (`+attack._target_=…`) to have an attack of your own. Its fields
    decide what it finds, and tell results of one setting from those of another.
    """

    def search(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        captions: Sequence[str],
        seed: int,
        batches: ShrinkingBatches,
        advance: Callable[[int, int], None],
    ) -> Conditioning | None:
        """What brings back the pictures, a row a picture; None where nothing is searched.

        Args:
            latents: (N, C, H, W) scaled, of the pictures.
            captions: N of them, which training told the model of these pictures.
            batches: how many rows go through the network at a time.
            advance: told of what is done, of how much.
        """
        return None

    def __str__(self) -> str:
        return "none"


@dataclass(frozen=True)
class EmbeddingSearch(Attack):
    """Adam on the text embedding, from the caption's own (DoRI; Kowalczuk et al., ICML 2026, arXiv 2507.16880).

    Each step goes down the model's own denoising loss on the picture, averaged over timesteps and noises that are
    drawn anew. All of `hidden` is searched but BOS; a pooled embedding stays the caption's.

    Args:
        steps: of Adam.
        lr: of Adam, in units of the embedding: each number of it moves by at most about so much a step.
        batch_size: R, draws of timestep and noise in a step.
    """

    steps: int = 50
    lr: float = 0.1
    batch_size: int = 8

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"attack.{name} must be >= 1, got {getattr(self, name)}; attack=none searches nothing")
        if not self.lr > 0:
            raise ValueError(f"attack.lr must be > 0, got {self.lr:g}; attack=none searches nothing")

    def search(self, denoiser, latents, captions, seed, batches, advance):
        return search_embeddings(denoiser, latents, captions, self, seed, batches, advance)

    def __str__(self) -> str:
        return f"{self.steps} Adam steps at {self.lr:g} on the text embedding, {self.batch_size} draws each"


def search_embeddings(
    denoiser: Denoiser,
    latents: Tensor,
    captions: Sequence[str],
    settings: EmbeddingSearch | None = None,
    seed: int = 0,
    batches: ShrinkingBatches | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Conditioning:
    """Text embeddings under which the model denoises these pictures better than under their captions.

        e* = argmin_e E_{t, eps} || f(x_t, t, e) - y ||^2,  f the network's prediction and y its target

    Weights stay as they are and have no gradient. Suspects are problems of their own, whatever they are searched
    together with: timesteps and noises of a suspect depend on (seed, caption, step, draw) alone, and Adam works
    number by number.

    Args:
        latents: (N, C, H, W) scaled, of the pictures.
        captions: N of them.
        settings: None: the paper's.
        batches: rows of a forward with a gradient, halved where memory runs out; None: 16.
        advance: told of steps that are made, of how many of all suspects.

    Returns:
        Conditioning of N rows, on the CPU, in the precision of the text encoders.

    Raises:
        ValueError: an embedding is not finite, as float16 may have it.
    """
    settings, batches = settings or EmbeddingSearch(), batches or ShrinkingBatches(16)
    total, found = len(captions), []
    while (first := sum(map(len, found))) < total:
        some = slice(first, first + max(1, batches.batch_size // settings.batch_size))

        def tell(steps: int, first: int = first, count: int = len(captions[some])) -> None:
            advance(first * settings.steps + count * steps, total * settings.steps)

        cond = _search(denoiser, latents[some].to(denoiser.device), captions[some], settings, seed, batches, tell)
        found.append(cond.map(lambda value: value.cpu()))
    return Conditioning.cat(found)


def _search(
    denoiser: Denoiser,
    latents: Tensor,
    captions: Sequence[str],
    settings: EmbeddingSearch,
    seed: int,
    batches: ShrinkingBatches,
    tell: Callable[[int], None],
) -> Conditioning:
    """S suspects together: the gradient of each is gathered in batches of rows, then Adam makes its step."""
    cond, draws = denoiser.encode(list(captions)), settings.batch_size
    held = int(denoiser.model.caption_tokenizer.bos_token_id is not None)  # a T5 and a language model have no BOS
    bos, free = cond.hidden[:, :held], cond.hidden[:, held:].float().clone()  # float32 takes steps that float16 loses
    seeds = [generation_seeds(caption, 1, seed, Stream.ATTACK)[0] for caption in captions]
    optimizer = torch.optim.Adam([free], lr=settings.lr)
    with denoiser.frozen():
        for step in range(settings.steps):
            drawn = [_draws(denoiser, own, step, draws) for own in seeds]

            def work(rows: range, step_draws: list[Draws] = drawn) -> tuple[list[int], Tensor]:
                suspects, places = [row // draws for row in rows], [row % draws for row in rows]
                timesteps, noise = (
                    torch.stack([getattr(step_draws[n], name)[r] for n, r in zip(suspects, places, strict=True)])
                    for name in ("timesteps", "noise")
                )
                given = replace(cond, hidden=torch.cat([bos.float(), free.detach()], dim=1)).index(suspects)
                gradient = _gradient(denoiser, latents[suspects], timesteps, noise, given, bos.dtype)
                return suspects, gradient[:, held:]

            free.grad = torch.zeros_like(free)
            for suspects, gradient in batches.over(len(captions) * draws, work):
                for suspect, row in zip(suspects, gradient, strict=True):  # in this order on any device
                    free.grad[suspect] += row / draws
            optimizer.step()
            tell(step + 1)
    if not free.isfinite().all():
        raise ValueError(f"attack: an embedding is not finite after {settings}; take dtype=float32 or a smaller lr")
    return replace(cond, hidden=torch.cat([bos, free.detach().to(bos.dtype)], dim=1))


def _draws(denoiser: Denoiser, seed: int, step: int, count: int) -> Draws:
    """Timesteps and noises of a suspect with this seed at one step, on the CPU."""
    process = denoiser.model.noise_process
    return draw(seed, Stream.ATTACK, step, range(count), denoiser.latent_shape, process)


def _gradient(
    denoiser: Denoiser, latents: Tensor, timesteps: Tensor, noise: Tensor, given: Conditioning, dtype: torch.dtype
) -> Tensor:
    """(B, L, D) float32, of each row's loss, a mean of squares, to its text embedding.

    Args:
        latents, noise: (B, C, H, W).
        timesteps: (B,).
        given: B rows, `hidden` in float32.
        dtype: that the network takes `hidden` in.
    """
    model, device = denoiser.model, denoiser.device
    timesteps, noise = timesteps.to(device), noise.to(device)
    noisy = model.noise_process.add_noise(latents, noise, timesteps).to(denoiser.dtype)
    target = model.noise_process.target(latents, noise, timesteps)
    hidden = given.hidden.requires_grad_(True)
    with torch.enable_grad():
        prediction = model.predict(noisy, timesteps, replace(given, hidden=hidden.to(dtype)))
        # summed, and divided below: the gradient of a mean over so many numbers is below what float16 knows
        (gradient,) = torch.autograd.grad((prediction.float() - target).square().sum(), hidden)
    return gradient / latents[0].numel()
