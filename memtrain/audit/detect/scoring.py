"""Scores of many generations in one pass: what can share a forward does, and the path stops early.

Shapes: B rows (generations), k scored steps, P prompts, n generations of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds, shared_seeds
from memtrain.audit.detect.attention import CrossAttention, cross_attention, end_positions
from memtrain.audit.detect.scores import Density, ScoredStep, StepScore
from memtrain.audit.sampling import SamplingPath
from memtrain.models.conditioning import Conditioning
from memtrain.models.samplers import Predictions

Load = Callable[[], tuple[Denoiser, Sequence[StepScore | Density]]]


@dataclass(frozen=True)
class DetectionSettings:
    """How generations are made and which of their steps are scored (docs/method.md, detection)."""

    num_images_per_prompt: int = 4
    num_scored_steps: int = 1  # scored, from the first on
    num_inference_steps: int = 50  # of the schedule
    guidance_scale: float | None = None  # the family's own
    seed: int = 0
    shared_noise: int | None = None  # x_T are drawn from so many that all prompts share; None: each has its own

    def __post_init__(self):
        if self.shared_noise is not None and self.shared_noise < self.num_images_per_prompt:
            raise ValueError(
                f"shared_noise must be at least num_images_per_prompt ({self.num_images_per_prompt}) or null, "
                f"got {self.shared_noise}; 64 is usual"
            )
        for name in ("num_images_per_prompt", "num_scored_steps", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.num_scored_steps > self.num_inference_steps:
            raise ValueError(
                f"num_scored_steps must be <= num_inference_steps ({self.num_inference_steps}), "
                f"got {self.num_scored_steps}"
            )

    def seeds(self, prompt: str) -> list[int]:
        """Of the prompt's n generations; a function of prompt and settings alone."""
        if self.shared_noise is None:
            return generation_seeds(prompt, self.num_images_per_prompt, self.seed)
        return shared_seeds(prompt, self.num_images_per_prompt, self.seed, self.shared_noise)


@dataclass(frozen=True)
class Plan:
    """Which scores are taken, and how."""

    settings: DetectionSettings
    step_scores: tuple[StepScore, ...]
    densities: tuple[Density, ...] = ()

    def __post_init__(self):
        names = self.names
        if not names:
            raise ValueError("scores is an empty list; say scores=[magnitude]")
        if len(set(names)) < len(names):
            raise ValueError(f"scores names one twice: {', '.join(names)}")
        if self.densities and self.settings.num_images_per_prompt < 2:
            name = self.densities[0].name
            raise ValueError(f"{name} compares generations: num_images_per_prompt must be >= 2, got 1")

    @property
    def names(self) -> list[str]:
        return [score.name for score in (*self.step_scores, *self.densities)]

    @property
    def steps_run(self) -> int:
        to_the_end = self.densities or any(score.to_the_end for score in self.step_scores)
        return self.settings.num_inference_steps if to_the_end else self.settings.num_scored_steps

    @property
    def shares_first_nulls(self) -> bool:
        """Whether what is predicted without a prompt at the first step is made once for all prompts.

        Not where attention is read there: it is read of both sides.
        """
        read = any(score.reads_attention or (score.to_the_end and self.steps_run == 1) for score in self.step_scores)
        return self.settings.shared_noise is not None and not read

    def evaluations(self) -> int:
        """Rows that the network predicts for a prompt, all scores together; shared ones, made once, are not counted."""
        extra = sum(score.extra_evaluations for score in self.step_scores)
        steps = 2 * self.steps_run - self.shares_first_nulls
        return self.settings.num_images_per_prompt * (steps + extra * self.settings.num_scored_steps)

    def evaluations_alone(self) -> dict[str, int]:
        """The same for each score, were it the only one."""
        alone = [Plan(self.settings, (score,)) for score in self.step_scores]
        alone += [Plan(self.settings, (), (density,)) for density in self.densities]
        return {plan.names[0]: plan.evaluations() for plan in alone}


def plan_of(settings: DetectionSettings, scores: Sequence[StepScore | Density]) -> Plan:
    """The plan that takes these scores. Raises ValueError where it makes no sense."""
    return Plan(
        settings,
        tuple(score for score in scores if isinstance(score, StepScore)),
        tuple(score for score in scores if not isinstance(score, StepScore)),
    )


@dataclass(frozen=True)
class Scored:
    """Scores of P prompts."""

    steps: dict[str, np.ndarray]  # (P, n, k) float32
    densities: dict[str, np.ndarray]  # (P,) float32


class SharedNulls:
    """What is predicted of x_T without a prompt, of each seed once: it does not depend on the prompt.

    A row at a time, so that it does not depend on which prompts came first either.
    """

    def __init__(self):
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # a seed -> (1, C, H, W) of `predict_one`, both

    def pair(
        self, denoiser: Denoiser, latents: Tensor, t: float, cond: Conditioning, null: Conditioning, seeds: list[int]
    ) -> Predictions:
        """As `Denoiser.predict_pair` of B rows with these seeds, in a forward of B rows."""
        for row, seed in enumerate(seeds):
            if seed not in self._made:
                self._made[seed] = denoiser.predict_one(latents[row : row + 1], t, null.index([row]))
        nulls = (torch.cat(rows) for rows in zip(*(self._made[seed] for seed in seeds), strict=True))
        (null_prediction, null_noise), (cond_prediction, cond_noise) = nulls, denoiser.predict_one(latents, t, cond)
        return Predictions(cond_prediction, null_prediction, cond_noise, null_noise)


@torch.no_grad()
def follow(
    denoiser: Denoiser,
    plan: Plan,
    prompts: list[str],
    cond: Conditioning,
    end_places: Tensor,
    seeds: list[int],
    nulls: SharedNulls,
) -> tuple[dict[str, Tensor], Tensor]:
    """B generations along their paths, each from its seed, as far as the plan needs.

    Returns:
        Each step score, (B, k), and the latents (B, C, H, W), finished ones where densities are asked for.
    """
    settings, null = plan.settings, denoiser.model.null(len(cond))
    denoiser = denoiser.guided(settings.guidance_scale)
    ending = [score for score in plan.step_scores if score.to_the_end]
    stepwise = [score for score in plan.step_scores if not score.to_the_end]
    read = any(score.reads_attention for score in stepwise)
    attention: CrossAttention | None = None

    def predict(index: int, t: float, latents: Tensor) -> Predictions:
        nonlocal attention
        if (read and index < settings.num_scored_steps) or (ending and index == plan.steps_run - 1):
            with cross_attention(denoiser.model.network, end_places) as attention:
                return denoiser.predict_pair(latents, t, cond, null)
        if index == 0 and plan.shares_first_nulls:
            return nulls.pair(denoiser, latents, t, cond, null, seeds)
        return denoiser.predict_pair(latents, t, cond, null)

    values: dict[str, list[Tensor]] = {score.name: [] for score in plan.step_scores}
    differences: list[Tensor] = []
    schedule = denoiser.guidance_scale, settings.num_inference_steps
    path = SamplingPath(denoiser, denoiser.noise(seeds), cond, *schedule, plan.steps_run, predict)
    for shown in path:
        if shown.index < settings.num_scored_steps:
            step = ScoredStep(**vars(shown), prompts=prompts, cond=cond, null=null, attention=attention)
            for score in stepwise:
                values[score.name].append(score.at(denoiser, step))
            if ending:
                differences.append(shown.predicted.difference)
    for score in ending:
        values[score.name] = score.at_end(differences, attention.end_map(*path.latents.shape[-2:]))
    return {name: torch.stack(columns, dim=1) for name, columns in values.items()}, path.latents


def score_prompts(
    denoiser: Denoiser, plan: Plan, prompts: Sequence[str], batches: ShrinkingBatches, nulls: SharedNulls
) -> Scored:
    """Scores of P prompts; `batches` says how many generations are followed at a time."""
    n = plan.settings.num_images_per_prompt
    seeds = [seed for prompt in prompts for seed in plan.settings.seeds(prompt)]

    def work(rows: range) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        first = rows.start // n
        texts = list(prompts[first : (rows.stop - 1) // n + 1])
        places = torch.tensor([row // n - first for row in rows], device=denoiser.device)
        ends = end_positions(denoiser.model.tokenize(texts), denoiser.model.caption_tokenizer.eos_token_id)
        ends = ends.to(denoiser.device)
        cond = denoiser.encode(texts).index(places)
        shown = [texts[place] for place in places.tolist()]
        found, latents = follow(denoiser, plan, shown, cond, ends[places], seeds[rows.start : rows.stop], nulls)
        images = denoiser.model.decode(latents) if plan.densities else None
        return {name: value.cpu().numpy() for name, value in found.items()}, images

    parts = list(batches.over(len(seeds), work))
    shape = (len(prompts), n, plan.settings.num_scored_steps)
    steps = {
        score.name: np.concatenate([found[score.name] for found, _ in parts]).reshape(shape)
        for score in plan.step_scores
    }
    densities: dict[str, np.ndarray] = {}
    if plan.densities:
        images = np.concatenate([pictures for _, pictures in parts])
        images = images.reshape(len(prompts), n, *images.shape[1:])
        for density in plan.densities:
            densities[density.name] = np.array([density.of_prompt(own) for own in images], dtype=np.float32)
    return Scored(steps, densities)


def in_chunks(total: int, size: int) -> Iterator[range]:
    """Consecutive ranges of at most `size` that cover range(total)."""
    return (range(first, min(first + size, total)) for first in range(0, total, size))


@dataclass
class Scorer:
    """What scores prompts: a model, what is asked of it, and as many generations at a time as fit."""

    denoiser: Denoiser
    plan: Plan
    batches: ShrinkingBatches
    nulls: SharedNulls = field(default_factory=SharedNulls)

    def __call__(self, positions: list[int], prompts: list[str]) -> pa.Table:
        """A row a prompt, each with its place in the list."""
        return _part(positions, score_prompts(self.denoiser, self.plan, prompts, self.batches, self.nulls))


def load_scorer(load: Load, settings: DetectionSettings, batch_size: int) -> Scorer:
    """The scorer of another process."""
    denoiser, scores = load()
    return Scorer(denoiser.guided(settings.guidance_scale), plan_of(settings, scores), ShrinkingBatches(batch_size))


def no_scores(plan: Plan) -> pa.Table:
    """Scores of no prompt."""
    none = np.zeros((0, plan.settings.num_images_per_prompt, plan.settings.num_scored_steps), np.float32)
    steps = {score.name: none for score in plan.step_scores}
    return _part([], Scored(steps, {density.name: none[:, 0, 0] for density in plan.densities}))


def _part(positions: list[int], scored: Scored) -> pa.Table:
    columns = {"position": pa.array(positions, pa.int64())}
    columns |= {f"{name}_steps": nested(values) for name, values in scored.steps.items()}
    return pa.table(columns | {name: pa.array(values, pa.float32()) for name, values in scored.densities.items()})


def nested(values: np.ndarray) -> pa.ListArray:
    """(P, n, k) as a column of lists of lists."""
    prompts, generations, steps = values.shape
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), pa.float32())
    inner = pa.ListArray.from_arrays(pa.array(range(0, len(flat) + 1, steps), pa.int32()), flat)
    return pa.ListArray.from_arrays(pa.array(range(0, prompts * generations + 1, generations), pa.int32()), inner)


def flat(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of lists as its numbers, one after the other."""
    return np.concatenate([np.zeros(0, np.float32), *(chunk.flatten().flatten().to_numpy() for chunk in column.chunks)])
