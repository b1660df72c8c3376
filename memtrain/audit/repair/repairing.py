"""The repair of a finished model: change its weights until what it had memorized looks as if it had never been seen.

Shapes: N pictures to forget, G generations of a caption, C x H x W latents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.margin import latents_margin
from memtrain.audit.repair.material import CaptionedPictures, Drawing
from memtrain.audit.repair.methods import Change, Method
from memtrain.audit.repair.work import Steps, Work
from memtrain.audit.scored_path import ScoredPath, mean_scores
from memtrain.core.copies import DEFAULT_FALSE_COPIES, DEFAULT_MAX_RMSE, copy_cut, latent_rmse, nearest
from memtrain.models.adapters import Adapter


@dataclass(frozen=True)
class Criterion:
    """When a model has forgotten enough: forgotten captions score and copy as never-seen ones do.

    Args:
        score_margin: share by which the forgotten captions' mean score may be higher than the never-seen captions'.
        copy_margin: their copies may be so many more than what chance makes of never-seen captions, of 1.
        min_steps: but not before so many steps: the captions are answered anew long before an attack finds nothing.
        look_every: steps between two looks at scores.
        max_rmse, false_copies: what a copy is, see `memtrain.core.copies.copy_cut`.
    """

    score_margin: float = 0.1
    copy_margin: float = 0.02
    min_steps: int = 20
    look_every: int = 5
    max_rmse: float = DEFAULT_MAX_RMSE
    false_copies: float = DEFAULT_FALSE_COPIES

    def __post_init__(self):
        for name in ("score_margin", "copy_margin", "min_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name):g}")
        if self.look_every < 1:
            raise ValueError(f"look_every must be >= 1, got {self.look_every}")


@dataclass(frozen=True)
class Look:
    """What a look at the model has found; None: not looked for."""

    step: int
    scores: list[float]  # d at the first step of each forgotten caption, mean over generations
    copies: list[float] | None = None  # share of each forgotten caption's generations that are copies of its picture
    forgotten_loss: float | None = None  # of the method, mean over the steps since the last look
    drift: float | None = None  # mean square by which kept predictions have moved since the start, over these steps

    @property
    def score(self) -> float:
        return fmean(self.scores)

    @property
    def copy_rate(self) -> float | None:
        return None if self.copies is None else fmean(self.copies)


@dataclass(frozen=True)
class NeverSeen:
    """What the model makes of captions that it was not trained on, before the repair."""

    captions: list[str]
    score: float  # mean
    copy_rate: float  # share of their generations that are copies of a forgotten picture
    cut: float  # the distance up to which a generation is a copy
    cut_is: str


@dataclass(frozen=True)
class Watched:
    """Generations of captions before the repair and after it, from the same noise."""

    captions: list[str]
    before: Tensor  # (N, G, C, H, W)
    after: Tensor

    @property
    def drift(self) -> Tensor:
        """(N,) root mean square difference of the latents, mean over generations."""
        apart = latent_rmse(self.after.flatten(0, 1), self.before.flatten(0, 1))
        return apart.unflatten(0, self.before.shape[:2]).mean(dim=1)


@dataclass(frozen=True)
class Repaired:
    """What a repair did; the model holds its weights."""

    looks: list[Look]  # the first is before any step, the last after the last one
    reached: bool
    said: str  # in one line, whether it has reached what it was to reach
    never_seen: NeverSeen
    forgotten: Watched
    kept: Watched
    alignment_before: float | None  # caption margin of the kept captions' generations, by the model as it was
    alignment_after: float | None
    earlier: dict[str, float]  # copies of pictures that were forgotten before: before this repair, and after it
    passes: Counter[str] = field(default_factory=Counter)  # forward passes of a row; a backward counts two

    @property
    def steps(self) -> int:
        return self.looks[-1].step


class Repair:
    """One model that is repaired by one method.

    Args:
        denoiser: the model, which is changed in place.
        adapter: what of it is changed; nothing is attached yet.
        forgotten: pictures that are to go.
        kept: pictures that are to stay.
        never_seen: captions that the model was not trained on; what it makes of them is the mark.
        watched: kept captions whose pictures are drawn before and after.
        neighbours: a caption near to each forgotten one; for methods that need them.
        earlier: pictures that were forgotten before.

    Raises:
        ValueError: the model cannot have the adapter, or there is no never-seen caption.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        adapter: Adapter,
        forgotten: CaptionedPictures,
        kept: CaptionedPictures,
        never_seen: Sequence[str],
        watched: Sequence[str],
        *,
        settings: Steps | None = None,
        criterion: Criterion | None = None,
        sampling: Drawing | None = None,
        neighbours: Sequence[str] | None = None,
        earlier: CaptionedPictures | None = None,
        seed: int = 0,
        batch_size: int = 16,
        gradient_checkpointing: bool = False,
    ):
        if not never_seen:
            raise ValueError("there is no caption that the model has not seen; say reference=FILE with some")
        self.denoiser, self.adapter = denoiser, adapter
        self.forgotten, self.kept, self.earlier = forgotten, kept, earlier
        self.settings, self.criterion = settings or Steps(), criterion or Criterion()
        self.sampling, self.seed, self.neighbours = sampling or Drawing(), seed, neighbours
        self.batches, self.watched = ShrinkingBatches(batch_size), list(watched)
        self.gradient_checkpointing = gradient_checkpointing
        self.path = ScoredPath((0,), self.sampling.num_inference_steps, self.sampling.guidance_scale)
        self.passes: Counter[str] = Counter()
        with torch.no_grad():
            self.never_seen = self._never_seen(list(never_seen))
            self.before = self._draw(forgotten.captions)
            self.first = Look(0, self._scores(), self._copies(self.before, forgotten))

    @property
    def reproduces_nothing(self) -> bool:
        """Whether the model is as it should be before any step: it copies no more than chance does."""
        return self._is_reached(self.first)

    def run(self, method: Method, advance: Callable[[int, int], None] = lambda done, total: None) -> Repaired:
        """Change the weights step by step, until enough is forgotten or the steps are over.

        Args:
            advance: told of steps that are made, of how many at most.
        """
        earlier_before = None if self.earlier is None else self._copies(self._draw(self.earlier.captions), self.earlier)
        kept_before = self._draw(self.watched)
        model = self.denoiser.model
        model.make_trainable(False, self.gradient_checkpointing, False, False)
        self.adapter.attach(model, self.seed)
        model.eval()
        anchor = self.adapter.anchor(model)
        work = Work(
            model, anchor, self.forgotten, self.kept, self.settings, self.seed, self.neighbours, self.earlier,
            self.batches,
        )  # fmt: skip
        looks, after = self._change(method, work, advance)
        kept_after = self._draw(self.watched)
        with torch.no_grad(), anchor.in_place(model):
            margins = [self._margin(drawn) for drawn in (kept_before, kept_after)]
        earlier = {}
        if self.earlier is not None and earlier_before is not None:
            copies = self._copies(self._draw(self.earlier.captions), self.earlier)
            earlier = {"before": fmean(earlier_before), "after": fmean(copies)}
        reached = self._is_reached(looks[-1])
        return Repaired(
            looks=looks,
            reached=reached,
            said=self._said(looks[-1], reached),
            never_seen=self.never_seen,
            forgotten=Watched(self.forgotten.captions, self.before, after),
            kept=Watched(self.watched, kept_before, kept_after),
            alignment_before=margins[0],
            alignment_after=margins[1],
            earlier=earlier,
            passes=self.passes + work.passes,
        )

    def _change(self, method: Method, work: Work, advance: Callable[[int, int], None]) -> tuple[list[Look], Tensor]:
        """Change the weights, and look at them; the looks, and what forgotten captions draw after it, (N, G, …)."""
        every, least = (self.criterion.look_every, self.criterion.min_steps) if method.trains else (1, 0)
        looks, changes = [self.first], list[Change]()
        for step, change in enumerate(method.changes(work), start=1):
            changes.append(change)
            advance(step, self.settings.steps)
            if step % every:
                continue
            look = self._look(step, changes)
            changes = []
            if step >= least and self._scores_reached(look.score):
                drawn = self._draw(self.forgotten.captions)
                look = replace(look, copies=self._copies(drawn, self.forgotten))
                if self._is_reached(look):
                    return [*looks, look], drawn
            looks.append(look)
        last = self._look(looks[-1].step + len(changes), changes) if changes else looks.pop()
        drawn = self._draw(self.forgotten.captions)
        return [*looks, replace(last, copies=self._copies(drawn, self.forgotten))], drawn

    # ---- looks

    def _look(self, step: int, changes: Sequence[Change]) -> Look:
        """Scores after a step, and what the steps since the last look did."""
        losses, drifts = ([getattr(change, name) for change in changes] for name in ("forgotten", "kept"))
        return Look(step, self._scores(), None, _mean(losses), _mean(drifts))

    def _scores(self, captions: Sequence[str] | None = None) -> list[float]:
        captions = self.forgotten.captions if captions is None else captions
        count = self.sampling.num_images_per_prompt
        seeds = [generation_seeds(caption, count, self.seed) for caption in captions]
        self.passes["looks"] += 2 * count * len(captions)
        return mean_scores(self.denoiser, captions, seeds, self.path, self.batches)

    def _draw(self, captions: Sequence[str]) -> Tensor:
        if not captions:
            return torch.zeros(0, self.sampling.num_images_per_prompt, *self.denoiser.latent_shape)
        self.passes["looks"] += self.sampling.passes(len(captions))
        return self.sampling.draw(self.denoiser, captions, self.seed, self.batches)

    def _copies(self, drawn: Tensor, pictures: CaptionedPictures) -> list[float]:
        """Share of each caption's generations, (N, G, …), that are copies of its picture."""
        apart = latent_rmse(drawn.flatten(0, 1), pictures.latents.repeat_interleave(drawn.shape[1], dim=0))
        return (apart <= self.never_seen.cut).float().unflatten(0, drawn.shape[:2]).mean(dim=1).tolist()

    def _never_seen(self, captions: list[str]) -> NeverSeen:
        drawn = self._draw(captions).flatten(0, 1)
        chance, _ = nearest(drawn, [self.forgotten.latents])
        cut = copy_cut(chance, self.criterion.max_rmse, self.criterion.false_copies)
        rate = (chance <= cut.distance).float().mean().item()
        return NeverSeen(captions, fmean(self._scores(captions)), rate, cut.distance, cut.why)

    def _margin(self, drawn: Tensor) -> float | None:
        """Median caption margin of the watched captions' generations, by the model as it was."""
        if not len(drawn):
            return None
        prompts = [caption for caption in self.watched for _ in range(drawn.shape[1])]
        seeds = [own for caption in self.watched for own in generation_seeds(caption, drawn.shape[1], self.seed)]
        self.passes["looks"] += 18 * len(prompts)
        return latents_margin(self.denoiser, drawn.flatten(0, 1), prompts, seeds, self.batches).median().item()

    # ---- when to stop

    def _scores_reached(self, score: float) -> bool:
        return score <= self.never_seen.score * (1 + self.criterion.score_margin)

    def _is_reached(self, look: Look) -> bool:
        copies = look.copy_rate
        is_few = copies is not None and copies <= self.never_seen.copy_rate + self.criterion.copy_margin
        return is_few and self._scores_reached(look.score)

    @property
    def said_of_start(self) -> str:
        """What the model makes of the forget list before any step, with both margins."""
        return self._figures(self.first)

    def _figures(self, look: Look) -> str:
        mark = self.never_seen
        return (
            f"copies {look.copy_rate:.1%} (never-seen captions {mark.copy_rate:.1%}, margin "
            f"{self.criterion.copy_margin:.1%}), score {look.score:.3f} (never-seen captions {mark.score:.3f}, margin "
            f"{self.criterion.score_margin:.0%})"
        )

    def _said(self, look: Look, reached: bool) -> str:
        what = self._figures(look)
        if reached:
            return f"forgotten after {look.step} steps: {what}"
        return f"not forgotten within {look.step} steps: {what}; raise steps or lr, or choose another method"


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if value == value]
    return fmean(known) if known else None
