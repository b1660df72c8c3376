"""Generate a prompt with and without a mitigation, from the same noise.

Shapes: R rows (a row is one generation), S denoising steps, L tokens, D width of the text embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.mitigate.methods import Embedding, Mitigation, Start
from memtrain.audit.pictures import decode_latents
from memtrain.audit.sampling import SamplingPath
from memtrain.audit.scored_path import ScoredPath, mean_scores


@dataclass(frozen=True)
class Sampling:
    """How generations are drawn, each from a seed."""

    num_inference_steps: int = 50
    guidance_scale: float | None = None  # the family's own

    def __post_init__(self):
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be >= 1, got {self.num_inference_steps}")


@dataclass(frozen=True)
class Generations:
    """R generations, on the CPU: what they started from and what became of it."""

    prompts: list[str]  # as the text encoder was given them
    prompt_embeds: Tensor  # (R, L, D) in the pipeline's dtype: what the stock pipeline takes under this name
    pooled_prompt_embeds: Tensor | None  # (R, P), where the family has one
    start: Tensor  # (R, C, H, W) x_T: the stock pipeline's `latents`
    latents: Tensor  # (R, C, H, W) scaled, of the finished pictures
    scores: Tensor  # (R, S) d at each step of the path
    iterations: Tensor  # (R,) updates of an optimisation
    guided_from: Tensor  # (R,) first step with guidance; S where there was none

    @staticmethod
    def cat(parts: Sequence[Generations]) -> Generations:
        def joined(values: list):
            if isinstance(values[0], list):
                return [value for part in values for value in part]
            return None if values[0] is None else torch.cat(values)

        return Generations(*(joined([getattr(part, f.name) for part in parts]) for f in fields(Generations)))

    def rows(self, chosen: range) -> Generations:
        values = (getattr(self, f.name) for f in fields(self))
        return Generations(*(None if value is None else value[chosen.start : chosen.stop] for value in values))


@dataclass(frozen=True)
class Mitigated:
    """One prompt before and after. Pass `after.prompt_embeds` and `after.start` (as `latents`) to the stock
    pipeline (`denoiser.model.pipeline()`), and it draws the pictures of `images_after`."""

    prompt: str
    seeds: list[int]
    target: float | None
    before: Generations
    after: Generations
    images_before: np.ndarray  # (R, height, width, 3) uint8
    images_after: np.ndarray

    @property
    def scores_before(self) -> Tensor:
        """(R,) d at the first step."""
        return self.before.scores[:, 0]

    @property
    def scores_after(self) -> Tensor:
        """(R,) d at the first step, after the last update."""
        return self.after.scores[:, 0]

    @property
    def iterations(self) -> Tensor:
        return self.after.iterations

    @property
    def prompt_embeds(self) -> Tensor:
        return self.after.prompt_embeds


def mitigate(
    pipeline: DiffusionPipeline | Denoiser,
    prompt: str,
    target: float | str | None = None,
    *,
    method: Mitigation | None = None,
    reference: Sequence[str] | None = None,
    num_images_per_prompt: int = 4,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Mitigated:
    """Draw a prompt's pictures as they are and with a mitigation, from the same noise.

    Args:
        target: for methods that descend a score: d at the first step, per generation; or `"q0.9"`, that
            quantile of the scores of the `reference` prompts.
        guidance_scale: None is 7.5, of Flux.1 3.5.
        method: of `memtrain.audit.mitigate.methods`; None is `Embedding()`.

    Raises:
        ValueError: a target is needed and missing, or no number, or a quantile without reference.
    """
    denoiser = pipeline if isinstance(pipeline, Denoiser) else Denoiser.of(pipeline)
    method, sampling, batches = (
        method or Embedding(),
        Sampling(num_inference_steps, guidance_scale),
        ShrinkingBatches(batch_size),
    )
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be >= 1, got {num_images_per_prompt}")
    if method.needs_target:
        target = resolve_target(denoiser, target, reference, num_images_per_prompt, seed, sampling, batches)
    seeds = generation_seeds(prompt, num_images_per_prompt, seed)
    prompts = [prompt] * num_images_per_prompt
    before = generate(denoiser, prompts, seeds, sampling, batches)
    after = generate(denoiser, prompts, seeds, sampling, batches, method, target)
    return Mitigated(
        prompt=prompt,
        seeds=seeds,
        target=target if method.needs_target else None,
        before=before,
        after=after,
        images_before=decode_latents(denoiser, before.latents, batches),
        images_after=decode_latents(denoiser, after.latents, batches),
    )


def resolve_target(
    denoiser: Denoiser,
    target: float | str | None,
    reference: Sequence[str] | None,
    num_images_per_prompt: int,
    seed: int,
    sampling: Sampling,
    batches: ShrinkingBatches,
) -> float:
    """The target as a score. A quantile is taken over generations, of d at the first step."""
    if target is None:
        raise ValueError("this method needs target=, a score of the first step; or target=q0.9 reference=FILE")
    quantile = re.fullmatch(r"q(0?\.\d+|[01])", target) if isinstance(target, str) else None
    if quantile is None:
        try:
            value = float(target)
        except ValueError:
            value = float("nan")
        if not value >= 0:  # not `value < 0`: NaN must not pass
            raise ValueError(
                f"target must be a score >= 0, or q0 to q1 for a quantile of reference prompts, got {target}"
            )
        return value
    if not reference:
        raise ValueError(f"target={target} is a quantile of reference prompts and there are none; say reference=FILE")
    rows = [(text, [own]) for text in reference for own in generation_seeds(text, num_images_per_prompt, seed)]
    path = ScoredPath((0,), sampling.num_inference_steps, sampling.guidance_scale)
    scores = mean_scores(denoiser, [text for text, _ in rows], [own for _, own in rows], path, batches)
    return float(np.quantile(scores, float(quantile[1])))


def generate(
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    batches: ShrinkingBatches,
    method: Mitigation | None = None,
    target: float | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Generations:
    """One generation a prompt and seed, with a mitigation or as it is."""
    denoiser = denoiser.guided(sampling.guidance_scale)
    first = denoiser.model.sampler.timesteps(sampling.num_inference_steps)[0]

    def work(rows: range) -> Generations:
        own = [seeds[row] for row in rows]
        start = Start.of(denoiser, [prompts[row] for row in rows], own)
        if method is not None:
            start = method.apply(denoiser, start, first, target, [np.random.default_rng(seed) for seed in own])
        return follow(denoiser, start, sampling, holds_guidance=method is not None and method.holds_guidance)

    return Generations.cat(list(progress(batches.over(len(prompts), work), -(-len(prompts) // batches.batch_size))))


@torch.no_grad()
def follow(denoiser: Denoiser, start: Start, sampling: Sampling, holds_guidance: bool) -> Generations:
    """From x_T to the picture, noting d at each step.

    With `holds_guidance` a row follows the unconditional prediction until d has risen for the first time
    after it fell, and the guided one from that step on.
    """
    steps, rows, scores = sampling.num_inference_steps, len(start.prompts), []
    guided_from = torch.full((rows,), steps if holds_guidance else 0, device=start.latents.device)
    path = SamplingPath(denoiser, start.latents, start.cond, sampling.guidance_scale, steps)
    first = denoiser.model.sampler.timesteps(steps)[0]
    guided = path.weight
    is_all_noise = bool(denoiser.model.noise_process.is_all_noise(torch.tensor(first)))
    for step in path:
        scores.append(step.predicted.magnitude)
        if step.index >= 2 + is_all_noise:  # what is compared there is another thing
            is_past_minimum = (scores[-3] > scores[-2]) & (scores[-2] < scores[-1])
            guided_from = torch.where(is_past_minimum, guided_from.clamp(max=step.index), guided_from)
        held = (guided_from > step.index).reshape(-1, 1, 1, 1)
        path.weight = torch.where(held, 0.0, guided)  # 0 is the unconditional one
    pooled = start.cond.pooled
    return Generations(
        prompts=start.prompts,
        prompt_embeds=start.cond.hidden.cpu(),
        pooled_prompt_embeds=None if pooled is None else pooled.cpu(),
        start=start.latents.cpu(),
        latents=path.latents.cpu(),
        scores=torch.stack(scores, dim=1).cpu(),
        iterations=start.iterations,
        guided_from=guided_from.cpu(),
    )
