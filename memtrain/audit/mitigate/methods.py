"""Ways to keep a finished model from drawing a memorized picture.

Shapes: R rows (a row is one generation), L tokens, D width of the text embedding, C x H x W latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memtrain.audit.denoiser import Denoiser
from memtrain.models.conditioning import Conditioning
from memtrain.models.words import draw_words, insert_words, num_words_within, window


@dataclass(frozen=True)
class Start:
    """What R generations start from."""

    prompts: list[str]
    cond: Conditioning
    latents: Tensor  # (R, C, H, W) x_T, float32
    iterations: Tensor  # (R,) int64, updates that an optimisation made

    @staticmethod
    def of(denoiser: Denoiser, prompts: list[str], seeds: list[int]) -> Start:
        iterations = torch.zeros(len(prompts), dtype=torch.int64)
        return Start(prompts, denoiser.encode(prompts), denoiser.noise(seeds), iterations)


class Mitigation(ABC):
    """Subclass this and name the class in the config (`+method.mine._target_=…`) to have one of your own."""

    needs_target = False  # True: works until the score of the first step is at most the target
    holds_guidance = False  # True: a row is guided only from the first local minimum of d on

    @abstractmethod
    def apply(
        self,
        denoiser: Denoiser,
        start: Start,
        t: float,
        target: float | None,
        generators: list[np.random.Generator],
    ) -> Start:
        """Change the start of R rows.

        Args:
            t: timestep of the first denoising step.
            generators: one a row, a function of the row's seed.
        """


class Embedding(Mitigation):
    """Move the prompt's embedding until d at the first step is low (Wen et al. 2024, section 4.2).

    From the very x_T of the generation, each generation by itself. BOS keeps its embedding: it is no
    parameter, so neither gradient nor weight decay moves it.

    Args:
        lr: of AdamW.
        iterations: at most so many updates.
    """

    needs_target = True

    def __init__(self, lr: float = 0.05, iterations: int = 10):
        self.lr, self.iterations = _checked(lr, iterations)

    def apply(self, denoiser, start, t, target, generators):
        null = denoiser.model.null(len(start.prompts))
        held = int(denoiser.model.caption_tokenizer.bos_token_id is not None)  # a T5 has no BOS
        bos, free = start.cond.hidden[:, :held], start.cond.hidden[:, held:].float().clone()

        def conditioning(free: Tensor) -> Conditioning:
            return replace(start.cond, hidden=torch.cat([bos, free.to(bos.dtype)], dim=1))

        def evaluate(free: Tensor) -> tuple[Tensor, Tensor]:
            score = denoiser.predict_pair(start.latents, t, conditioning(free), null).magnitude
            return score, score

        optimizer = torch.optim.AdamW([free], lr=self.lr)
        with denoiser.frozen():
            iterations = _descend(free, evaluate, optimizer, self.iterations, target)
        return replace(start, cond=conditioning(free), iterations=iterations)


class InitialNoise(Mitigation):
    """Move x_T to where the landscape is less sharp (SAIL; Jeon et al., ICML 2025, algorithm 2).

    Descends d(x_T + u), with u the unit vector along eps_cond - eps_null at x_T; two network evaluations an
    update. Instead of being penalised for its norm, x_T keeps the one that it was drawn with, as Gaussian
    noise nearly does. The prompt is left alone.

    Args:
        lr: of Adam.
        iterations: at most so many updates.
    """

    needs_target = True

    def __init__(self, lr: float = 0.05, iterations: int = 10):
        self.lr, self.iterations = _checked(lr, iterations)

    def apply(self, denoiser, start, t, target, generators):
        null, latents = denoiser.model.null(len(start.prompts)), start.latents.clone()
        norm = latents.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)

        def evaluate(latents: Tensor) -> tuple[Tensor, Tensor]:
            predicted = denoiser.predict_pair(latents, t, start.cond, null)
            score = predicted.magnitude
            unit = predicted.difference / score.clamp(min=1e-12).reshape(-1, 1, 1, 1)
            return score, denoiser.predict_pair(latents + unit, t, start.cond, null).magnitude

        def keep_norm(latents: Tensor) -> Tensor:
            return latents * (norm / latents.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))

        optimizer = torch.optim.Adam([latents], lr=self.lr)
        with denoiser.frozen():
            iterations = _descend(latents, evaluate, optimizer, self.iterations, target, keep_norm)
        return replace(start, latents=latents, iterations=iterations)


def _checked(lr: float, iterations: int) -> tuple[float, int]:
    if not lr > 0:
        raise ValueError(f"lr of a mitigation must be > 0, got {lr:g}")
    if iterations < 1:
        raise ValueError(f"iterations of a mitigation must be >= 1, got {iterations}")
    return lr, iterations


def _descend(
    value: Tensor,
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    iterations: int,
    target: float,
    project: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Update the rows of `value` in place, each until its score is at most the target.

    Args:
        evaluate: value -> (score, objective), both (R,); rows do not mix.

    Returns:
        (R,) int64, updates that each row took.
    """
    used = torch.zeros(len(value), dtype=torch.int64, device=value.device)
    reached = torch.zeros(len(value), dtype=torch.bool, device=value.device)
    for _ in range(iterations):
        with torch.enable_grad():
            score, objective = evaluate(value.requires_grad_(True))
            reached |= score.detach() <= target
            if reached.all():
                break
            (value.grad,) = torch.autograd.grad(objective[~reached].sum(), value)
        before = value.detach().clone()
        optimizer.step()
        with torch.no_grad():  # a row that is there stays: no momentum, no decay
            rows = reached.reshape(-1, *[1] * (value.ndim - 1))
            value.copy_(torch.where(rows, before, project(value)))
        used += ~reached
    value.grad = None
    value.requires_grad_(False)
    return used.cpu()


class LateGuidance(Mitigation):
    """No guidance until the first local minimum of d, then the usual one (Jain et al., CVPR 2025).

    Until then the path is the unconditional one, so that it is not drawn into the memorized picture's basin.
    """

    holds_guidance = True

    def apply(self, denoiser, start, t, target, generators):
        return start


class Rewriting(Mitigation):
    """Words put into the prompt at random places (Somepalli et al. 2023), other ones for each generation.

    Args:
        count: words that are put in, all of them where the text encoder sees them.
    """

    def __init__(self, count: int = 4):
        if count < 1:
            raise ValueError(f"count of a mitigation must be >= 1 words, got {count}")
        self.count = count

    @abstractmethod
    def drawn(self, words: list[str], generator: np.random.Generator, tokenizer: Any) -> list[str]:
        """What is put into a prompt of these words."""

    def apply(self, denoiser, start, t, target, generators):
        tokenizer, prompts = denoiser.model.caption_tokenizer, []
        for prompt, generator in zip(start.prompts, generators, strict=True):
            words = prompt.split()
            if words:  # the empty prompt has nothing to hide
                added = self.drawn(words, generator, tokenizer)
                prompt = " ".join(insert_words(words, added, generator, tokenizer))
            prompts.append(prompt)
        return replace(start, prompts=prompts, cond=denoiser.encode(prompts))


class RandomTokens(Rewriting):
    """Random tokens of the vocabulary, decoded."""

    def drawn(self, words, generator, tokenizer):
        return draw_words(self.count, generator, tokenizer)


class RandomNumbers(Rewriting):
    """Random numbers below 100,000."""

    def drawn(self, words, generator, tokenizer):
        return [str(number) for number in generator.integers(100_000, size=self.count)]


class RepeatWords(Rewriting):
    """Words of the prompt once more."""

    def drawn(self, words, generator, tokenizer):
        seen = max(1, num_words_within(words, window(tokenizer), tokenizer))
        return [words[place] for place in generator.integers(seen, size=self.count)]
