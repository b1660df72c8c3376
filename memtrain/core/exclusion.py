"""Exclusion rules: which samples are left out of this step's loss.

A rule decides from what it knew when the optimizer step began and the sample's own observation, and learns
from all observations of the step (every rank, every micro-batch, the reference set) once the step is over.
So its decisions do not depend on how the global batch is cut into ranks and micro-batches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from memtrain.core.statistics import most_remembered
from memtrain.core.transfer import sent

# Groups. Canaries are planted; a sacrificed one is never excluded, so that rules learn what memorized looks like;
# a reference sample is never trained on.
TRAINED, CANARY, REFERENCE, SACRIFICED = range(4)
GROUP_NAMES = ("train", "canary", "reference", "sacrificed")

# What becomes of a sample that is left out. Its loss does not count; or, to undo what was learnt of it before, the
# squared distance between what the model predicts for its caption and for the empty one counts in its place
EXCLUDE, PULL = ACTIONS = ("exclude", "pull")


@dataclass(frozen=True)
class Observations:
    """What one step showed of B samples."""

    sample_index: Tensor  # (B,) int64, position of the sample in the corpus
    picture: Tensor  # (B,) int64, position of the first sample of its duplicates; its own where it has none
    copies: Tensor  # (B,) int64, how many samples of the corpus show the same picture
    timesteps: Tensor  # (B,) int64
    score: Tensor  # (B,) float32, the score that the rule goes by; 0 where it is not known
    loss: Tensor  # (B,) float32, unweighted
    group: Tensor  # (B,) int64, TRAINED, CANARY, REFERENCE or SACRIFICED
    captioned: Tensor  # (B,) bool, False for dropped or empty captions and unreadable samples: they say nothing
    scored: Tensor  # (B,) bool, the score was taken at this visit
    known: Tensor  # (B,) bool, the score was taken at this visit or is remembered from an earlier one
    score_timesteps: Tensor  # (B,) int64, where the score was taken; `timesteps`, unless it is remembered
    latent_numel: Tensor  # (B,) int64, elements of the sample's latents; they differ between aspect-ratio buckets
    second_score: Tensor  # (B,) float32, the one that is taken beside it (score=both); 0 where none is

    @classmethod
    def of_visit(cls, *, timesteps: Tensor, scored: Tensor, **rest: Tensor) -> Observations:
        """Rows of which nothing is remembered: a score is known if it was taken now."""
        rest = {"second_score": torch.zeros_like(rest["score"])} | rest
        return cls(timesteps=timesteps, scored=scored, known=scored, score_timesteps=timesteps, **rest)

    @property
    def finite(self) -> Tensor:
        """Whether a row's loss and scores are. (B,) bool"""
        return (self.loss + self.score + self.second_score).isfinite()

    @staticmethod
    def concatenate(parts: list[Observations]) -> Observations:
        return Observations(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Observations)))


@dataclass(frozen=True)
class Decision:
    """What a rule decided about B samples."""

    keep_mask: Tensor  # (B,) bool, True = trained on
    threshold: Tensor  # (B,) float32, what each sample was held against, in the rule's own unit
    # (B,) bool, which of those that are left out are pulled, where that is the rule's action; None: all of them
    pull_mask: Tensor | None = None

    def to(self, device: torch.device) -> Decision:
        """The same on a device, for which the host does not wait."""
        pull_mask = None if self.pull_mask is None else sent(self.pull_mask, device)
        return Decision(sent(self.keep_mask, device), sent(self.threshold, device), pull_mask)

    @staticmethod
    def concatenate(parts: list[Decision]) -> Decision:
        """Whom the parts keep, and why, one after the other; whom they pull is over with the step."""
        return Decision(torch.cat([part.keep_mask for part in parts]), torch.cat([part.threshold for part in parts]))


class ExclusionRule(ABC):
    """Decides which samples are left out of a step's loss.

    Subclass this and name the class in the config (`exclusion._target_`) to have a rule of your own.

    Args:
        start_step: before this optimizer step every sample is kept; rules learn from the first step on.
        action: what becomes of a sample that is left out: `exclude`, its loss does not count, or `pull`, its
            prediction is drawn to the one for the empty caption in its place.
    """

    learns = False  # True: `update` is called after every step with the observations of all ranks
    needs_score = True  # False: decides without scores, on every captioned row
    needs_reference = False  # True: useless without a reference set
    remembers = False  # True: decides by earlier visits, and so also where this one, of a dropped caption, says nothing
    # tensors (num_samples,) that `setup` makes by `zeros`, looked up by `picture` alone: ranks of a machine share them
    per_sample: tuple[str, ...] = ()
    start_step, action = 0, EXCLUDE  # of a rule whose constructor takes neither

    def __init__(self, start_step: int = 0, action: str = EXCLUDE):
        at_least(0, start_step=start_step)
        if action not in ACTIONS:
            raise ValueError(f"exclusion.action must be one of {', '.join(ACTIONS)}, got {action}")
        self.start_step, self.action = start_step, action

    @staticmethod
    def zeros(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(count,) zeros. A run puts another function in its place, so that ranks of a machine have the same memory."""
        return torch.zeros(count, dtype=dtype)

    def setup(self, num_samples: int, num_timesteps: int) -> None:  # noqa: B027
        """Called once, before the first step, with what the corpus and the model are like."""

    @abstractmethod
    def decide(self, observed: Observations) -> Decision:
        """Decide on the rows of one micro-batch.

        Kept whatever is said here: rows that are not `known` (where the rule needs no score: not `captioned`), unless
        the rule remembers; sacrificed canaries; and all rows before `start_step`.
        """

    def update(self, observed: Observations) -> None:  # noqa: B027
        """Learn from one whole optimizer step, rows ordered by their place in the global batch."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Restore what `state_dict` gave."""


def telling(observed: Observations) -> Tensor:
    """Which rows a rule may learn from: scored, score and loss finite and above 0. (B,) bool, on the CPU

    Where d is exactly 0 nothing could move it, such as a caption of no words; its logarithm is no small d's.
    """
    numbers = torch.stack([observed.score, observed.loss]).cpu()
    return observed.scored.cpu() & (numbers.isfinite() & (numbers > 0)).all(0)


def log_score(score: Tensor) -> Tensor:
    """The logarithm of d, finite where d is 0: such rows are not `telling`. (B,) -> (B,) float64, on the CPU"""
    return score.cpu().double().clamp(min=1e-12).log()


# ---- what the config or a checkpoint says; the comparisons are such that NaN does not pass


def positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"exclusion.{name} must be > 0, got {value:g}; use exclusion=none to keep every sample")
    return float(value)


def open_share(name: str, value: float, remedy: str) -> float:
    if not 0 < value < 1:
        raise ValueError(f"exclusion.{name} must be in (0, 1), got {value:g}; {remedy}")
    return float(value)


def at_least(least: int, **named: int) -> None:
    for name, value in named.items():
        if not value >= least:
            raise ValueError(f"exclusion.{name} must be >= {least}, got {value}")


def reachable(warmup: float, half_life: int, *, bins: int = 1, needed: str = "warmup", by: str = "half_life") -> None:
    """Raises ValueError where a count that forgets by halves never comes to what is needed of it."""
    most = bins * most_remembered(half_life)
    if not warmup < most:
        enough = math.floor(warmup / bins * math.log(2)) + 1
        while enough > 1 and warmup < bins * most_remembered(enough - 1):
            enough -= 1
        raise ValueError(
            f"exclusion.{needed}={warmup:g} is never reached: with exclusion.{by}={half_life} no more than {most:.1f} "
            f"observations are remembered; raise exclusion.{by} to at least {enough} or lower exclusion.{needed}"
        )


def restored(state: dict[str, Tensor], /, **own: Tensor) -> list[Tensor]:
    """Fill a rule's own tensors with what the checkpoint has of them; no second copy of 100 M samples."""
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            found = f"{name} of shape {tuple(state[name].shape)}" if name in state else f"no {name}"
            raise ValueError(
                f"the checkpoint's exclusion rule has {found}, this one's is {tuple(tensor.shape)}; resume with the "
                "exclusion and the shards that the run was started with"
            )
    return [tensor.copy_(state[name]) for name, tensor in own.items()]


# ---- rules that hold every score against one threshold


class KeepAll(ExclusionRule):
    """`exclusion=none`: every sample is trained on."""

    needs_score = False

    def __init__(self) -> None:  # takes nothing from a config
        super().__init__()

    def decide(self, observed: Observations) -> Decision:
        return Decision(keep_mask=torch.ones_like(observed.scored), threshold=torch.full_like(observed.score, math.inf))


class FixedThreshold(ExclusionRule):
    """`exclusion=fixed`: left out where d >= threshold, the raw norm (Wen et al. 2024, section 4.3)."""

    def __init__(self, threshold: float, start_step: int = 0, action: str = EXCLUDE):
        super().__init__(start_step, action)
        self.threshold = positive("threshold", threshold)

    def decide(self, observed: Observations) -> Decision:
        return Decision(
            keep_mask=observed.score < self.threshold, threshold=torch.full_like(observed.score, self.threshold)
        )


class NormalizedThreshold(ExclusionRule):
    """`exclusion=normalized`: left out where d / sqrt(n) >= threshold, n latent elements of a sample.

    Carries over between resolutions and aspect-ratio buckets: d grows with sqrt(n).
    """

    def __init__(self, threshold: float, start_step: int = 0, action: str = EXCLUDE):
        super().__init__(start_step, action)
        self.threshold = positive("threshold", threshold)

    def decide(self, observed: Observations) -> Decision:
        return Decision(
            keep_mask=observed.score / observed.latent_numel.sqrt() < self.threshold,
            threshold=torch.full_like(observed.score, self.threshold),
        )
