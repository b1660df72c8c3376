"""Mitigations against one another: score, copies of the training image, and what is left of the prompt.

Shapes: R rows (a row is one generation), P prompts, C x H x W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memtrain.audit.alignment import ClipScore
from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.margin import caption_margin, check_judge
from memtrain.audit.mitigate.methods import Mitigation
from memtrain.audit.mitigate.mitigation import Generations, Sampling, generate, resolve_target
from memtrain.audit.pictures import decode_latents, encode_images
from memtrain.core.copies import (
    DEFAULT_FALSE_COPIES,
    DEFAULT_MAX_RMSE,
    checked_false_copies,
    checked_max_rmse,
    copy_cut,
    copy_rate,
    is_copy,
    latent_rmse,
    nearest,
)


@dataclass(frozen=True)
class Outcome:
    """What a method made of all generations. None: not measured."""

    method: str
    score: float  # d at the first step, mean
    path_score: float  # d, mean over the path
    copy_rate: float | None
    rmse: float | None  # to the training image, median
    caption_margin: float | None  # median
    clip_score: float | None  # mean
    iterations: float  # mean


@dataclass(frozen=True)
class Judges:
    """What generations are judged by, beside their score. None: not judged."""

    originals: np.ndarray | None = None  # (P, height, width, 3) uint8, the prompts' training images
    max_rmse: float = DEFAULT_MAX_RMSE  # no copy: latents farther than this from the training image's
    false_copies: float = DEFAULT_FALSE_COPIES  # see `Comparison.set_cut`
    judge: Denoiser | None = None  # a model that memorized nothing
    clip: ClipScore | None = None

    def __post_init__(self):
        checked_max_rmse(self.max_rmse)
        checked_false_copies(self.false_copies)


@dataclass(frozen=True)
class MethodResult:
    """All generations of one method, a prompt's after another's."""

    outcome: Outcome
    generations: Generations
    images: np.ndarray  # (R, height, width, 3) uint8
    rmse: Tensor | None  # (R,)


@dataclass(frozen=True)
class BeforeAfter:
    """One prompt's generations; G of them."""

    prompt: str
    before: np.ndarray  # (G, height, width, 3) uint8
    after: np.ndarray
    scores_before: Sequence[float]
    scores_after: Sequence[float]
    original: np.ndarray | None = None  # (height, width, 3) uint8, the training image
    copies_before: Sequence[bool] | None = None  # a copy is framed
    copies_after: Sequence[bool] | None = None


class Comparison:
    """The same prompts from the same noise, by one method after another.

    Args:
        prompts: P of them; each is drawn `num_images_per_prompt` times.

    Raises:
        ValueError: no generation, or a judge of pictures of another size.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        prompts: Sequence[str],
        num_images_per_prompt: int,
        sampling: Sampling,
        judges: Judges,
        *,
        seed: int = 0,
        batch_size: int = 16,
    ):
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be >= 1, got {num_images_per_prompt}")
        if judges.judge is not None:
            check_judge(judges.judge, denoiser)
        self.denoiser, self.sampling, self.judges, self.seed = denoiser, sampling, judges, seed
        self.num_images_per_prompt, self.batches = num_images_per_prompt, ShrinkingBatches(batch_size)
        self.prompts = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]  # (R,)
        self.seeds = [own for prompt in prompts for own in generation_seeds(prompt, num_images_per_prompt, seed)]
        self.cut = copy_cut(torch.zeros(0), judges.max_rmse, judges.false_copies)
        self.originals: Tensor | None = None  # (R, C, H, W)
        if judges.originals is not None:
            latents = encode_images(denoiser, judges.originals, self.batches)
            self.originals = latents.repeat_interleave(num_images_per_prompt, dim=0)

    def target(self, target: float | str | None, reference: Sequence[str] | None) -> float:
        """See `resolve_target`."""
        return resolve_target(
            self.denoiser, target, reference, self.num_images_per_prompt, self.seed, self.sampling, self.batches
        )

    def set_cut(self, reference: Sequence[str], blocks: Iterable[Tensor]) -> None:
        """Set what a copy is by generations from prompts that were never trained on, without a method.

        Args:
            blocks: latents of the training pictures, (P, C, H, W), some at a time.
        """
        prompts = [prompt for prompt in reference for _ in range(self.num_images_per_prompt)]
        seeds = [own for text in reference for own in generation_seeds(text, self.num_images_per_prompt, self.seed)]
        made = generate(self.denoiser, prompts, seeds, self.sampling, self.batches)
        chance, _ = nearest(made.latents, blocks)
        self.cut = copy_cut(chance[chance.isfinite()], self.judges.max_rmse, self.judges.false_copies)

    def run(
        self,
        name: str,
        method: Mitigation | None,
        target: float | None,
        progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
    ) -> MethodResult:
        """Generate with a method (None: as it is), and judge."""
        made = generate(self.denoiser, self.prompts, self.seeds, self.sampling, self.batches, method, target, progress)
        images = decode_latents(self.denoiser, made.latents, self.batches)
        rmse = None if self.originals is None else latent_rmse(made.latents, self.originals)
        judge, clip = self.judges.judge, self.judges.clip
        margin = judge and caption_margin(judge, images, self.prompts, self.seeds, self.batches)
        said = Outcome(
            method=name,
            score=made.scores[:, 0].mean().item(),
            path_score=made.scores.mean().item(),
            copy_rate=None if rmse is None else copy_rate(rmse, self.cut.distance),
            rmse=None if rmse is None else rmse.median().item(),
            caption_margin=None if margin is None else margin.median().item(),
            clip_score=None if clip is None else self._clip_score(clip, images),
            iterations=made.iterations.float().mean().item(),
        )
        return MethodResult(said, made, images, rmse)

    def _clip_score(self, clip: ClipScore, images: np.ndarray) -> float:
        def work(rows: range) -> Tensor:
            return clip.scores(images[rows.start : rows.stop], self.prompts[rows.start : rows.stop])

        return torch.cat(list(self.batches.over(len(images), work))).mean().item()

    def pairs(self, before: MethodResult, after: MethodResult, count: int) -> list[BeforeAfter]:
        """The first prompts' generations before and after, to be drawn."""
        pairs = []
        for number in range(min(count, len(self.prompts) // self.num_images_per_prompt)):
            rows = slice(number * self.num_images_per_prompt, (number + 1) * self.num_images_per_prompt)
            copies = [
                None if result.rmse is None else is_copy(result.rmse[rows], self.cut.distance).tolist()
                for result in (before, after)
            ]
            pairs.append(
                BeforeAfter(
                    self.prompts[rows.start],
                    before.images[rows],
                    after.images[rows],
                    before.generations.scores[rows, 0].tolist(),
                    after.generations.scores[rows, 0].tolist(),
                    None if self.judges.originals is None else self.judges.originals[number],
                    *copies,
                )
            )
        return pairs


def markdown(outcomes: Sequence[Outcome]) -> str:
    """A method a line; what nobody measured is left out."""
    columns = [
        ("score, first step", ".2f", [o.score for o in outcomes]),
        ("score, whole path", ".2f", [o.path_score for o in outcomes]),
        ("copy rate", ".1%", [o.copy_rate for o in outcomes]),
        ("RMSE, median", ".2f", [o.rmse for o in outcomes]),
        ("caption margin", "+.1%", [o.caption_margin for o in outcomes]),
        ("CLIP score", ".1f", [o.clip_score for o in outcomes]),
        ("updates", ".1f", [o.iterations for o in outcomes]),
    ]
    measured = [(name, [format(v, form) for v in values]) for name, form, values in columns if None not in values]
    columns = [("method", [o.method for o in outcomes]), *measured]
    lines = [[name for name, _ in columns], ["---"] + ["--:"] * (len(columns) - 1)]
    lines += zip(*(cells for _, cells in columns), strict=True)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
