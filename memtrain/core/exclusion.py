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

from memtrain.core.statistics import BinnedMoments, timestep_bin

# Groups. Canaries are planted; a sacrificed one is never excluded, so that rules learn what memorized looks like;
# a reference sample is never trained on.
TRAINED, CANARY, REFERENCE, SACRIFICED = range(4)
GROUP_NAMES = ("train", "canary", "reference", "sacrificed")


@dataclass(frozen=True)
class Observations:
    """What one step showed of B samples."""

    sample_index: Tensor  # (B,) int64, position of the sample in the corpus
    timesteps: Tensor  # (B,) int64
    score: Tensor  # (B,) float32, text-conditional magnitude; 0 where it is not known
    loss: Tensor  # (B,) float32, unweighted
    group: Tensor  # (B,) int64, TRAINED, CANARY, REFERENCE or SACRIFICED
    captioned: Tensor  # (B,) bool, False for dropped or empty captions and unreadable samples: they say nothing
    scored: Tensor  # (B,) bool, the score was taken at this visit
    known: Tensor  # (B,) bool, the score was taken at this visit or is remembered from an earlier one
    score_timesteps: Tensor  # (B,) int64, where the score was taken; `timesteps`, unless it is remembered

    @staticmethod
    def concatenate(parts: list[Observations]) -> Observations:
        return Observations(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Observations)))


@dataclass(frozen=True)
class Decision:
    keep_mask: Tensor  # (B,) bool, True = trained on
    threshold: Tensor  # (B,) float32, what each sample was held against, in the rule's own unit


class ExclusionRule(ABC):
    """Subclass this and name the class in the config (`exclusion._target_`) to have a rule of your own."""

    learns = False  # True: `update` is called after every step with the observations of all ranks
    needs_score = True  # False: decides without scores, on every captioned row
    needs_reference = False  # True: useless without a reference set
    start_step = 0  # before this optimizer step every sample is kept; rules learn from the first step on

    def setup(self, num_samples: int, latent_numel: int, num_timesteps: int) -> None:  # noqa: B027
        """Called once, before the first step, with what the corpus and the model are like."""

    @abstractmethod
    def decide(self, observed: Observations) -> Decision:
        """Decide on the rows of one micro-batch.

        Kept whatever is said here: rows that are not `known` (where the rule needs no score: not `captioned`),
        sacrificed canaries, and all rows before `start_step`.
        """

    def update(self, observed: Observations) -> None:  # noqa: B027
        """Learn from one whole optimizer step, rows ordered by their place in the global batch."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Restore what `state_dict` gave."""


def log_score(score: Tensor) -> Tensor:
    """log d, finite where d is 0. float64, on the CPU"""
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


def restored(state: dict[str, Tensor], **own: Tensor) -> list[Tensor]:
    """Copies of a checkpoint's tensors, each as large as the rule's own."""
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            found = f"{name} of shape {tuple(state[name].shape)}" if name in state else f"no {name}"
            raise ValueError(
                f"the checkpoint's exclusion rule has {found}, this one's is {tuple(tensor.shape)}; resume with the "
                "exclusion and the shards that the run was started with"
            )
    return [state[name].clone() for name in own]


# ---- rules that hold every score against one threshold


class KeepAll(ExclusionRule):
    """`exclusion=none`: every sample is trained on."""

    needs_score = False

    def decide(self, observed: Observations) -> Decision:
        return Decision(
            keep_mask=torch.ones_like(observed.scored), threshold=torch.full_like(observed.score, math.inf)
        )


class FixedThreshold(ExclusionRule):
    """`exclusion=fixed`: left out where d >= threshold, the raw norm (Wen et al. 2024, section 4.3)."""

    def __init__(self, threshold: float, start_step: int = 0):
        at_least(0, start_step=start_step)
        self.threshold, self.start_step = positive("threshold", threshold), start_step

    def decide(self, observed: Observations) -> Decision:
        return Decision(
            keep_mask=observed.score < self.threshold, threshold=torch.full_like(observed.score, self.threshold)
        )


class NormalizedThreshold(ExclusionRule):
    """`exclusion=normalized`: left out where d / sqrt(n) >= threshold, n latent elements of a sample.

    Carries over between resolutions: d grows with sqrt(n).
    """

    def __init__(self, threshold: float, start_step: int = 0):
        at_least(0, start_step=start_step)
        self.threshold, self.start_step = positive("threshold", threshold), start_step

    def setup(self, num_samples: int, latent_numel: int, num_timesteps: int) -> None:
        self.root_n = math.sqrt(latent_numel)

    def decide(self, observed: Observations) -> Decision:
        return Decision(
            keep_mask=observed.score / self.root_n < self.threshold,
            threshold=torch.full_like(observed.score, self.threshold),
        )


class Evidence(ExclusionRule):
    """`exclusion=evidence`: a sample is left out, at every timestep, while the evidence against it is high.

    One draw of d says little, and only at high noise does a memorized sample stand above the others
    (METHOD.md, the trial). So each visit at t >= `min_timestep` gives a z-score, of log d, against what the
    never-trained reference set scores in the same timestep bin; a sample's evidence is the exponential
    moving average of its z-scores. It enters exclusion at `enter` and leaves below `leave`.

    Args:
        enter, leave: bounds on the evidence, in standard deviations of the reference set; leave <= enter.
        memory: weight of the past in a sample's moving average, in [0, 1); 0 acts on single draws.
        min_timestep: visits at lower timesteps are not counted, as a share of the schedule in [0, 1).
        num_bins: timestep bins over the whole schedule.
        half_life: reference observations of a bin after which an older one counts half.
        warmup: reference observations that a bin needs before its visits count.
    """

    learns = True
    needs_reference = True

    def __init__(
        self, enter: float, leave: float, memory: float, min_timestep: float, num_bins: int, half_life: int, warmup: int
    ):
        self.enter = positive("enter", enter)
        if not leave <= enter:
            raise ValueError(f"exclusion.leave must be <= exclusion.enter ({enter:g}), got {leave:g}")
        if not 0 <= memory < 1:
            raise ValueError(f"exclusion.memory must be in [0, 1), got {memory:g}; 0 acts on single draws")
        if not 0 <= min_timestep < 1:
            raise ValueError(f"exclusion.min_timestep is a share of the schedule in [0, 1), got {min_timestep:g}")
        for name, value in (("num_bins", num_bins), ("half_life", half_life), ("warmup", warmup)):
            if value < 1:
                raise ValueError(f"exclusion.{name} must be >= 1, got {value}")
        self.leave, self.memory, self.min_timestep = leave, memory, min_timestep
        self.num_bins, self.warmup = num_bins, warmup
        self.reference = BinnedMoments(num_bins, half_life)

    def setup(self, num_samples: int, latent_numel: int, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self.evidence = torch.zeros(num_samples)  # 4 bytes a sample
        self.excluded = torch.zeros(num_samples, dtype=torch.bool)

    def z_score(self, observed: Observations) -> tuple[Tensor, Tensor]:
        """How far log d lies above the reference set's, in its standard deviations, and whether that counts.

        Returns (B,) float32 and (B,) bool, on the CPU.
        """
        timesteps, score = observed.timesteps.cpu(), observed.score.cpu()
        bins = timestep_bin(timesteps, self.num_timesteps, self.num_bins)
        z = (score.clamp(min=1e-12).log().double() - self.reference.mean[bins]) / self.reference.std[bins]
        counts = observed.scored.cpu() & (timesteps >= self.min_timestep * self.num_timesteps)
        return z.float(), counts & (self.reference.count[bins] >= self.warmup)

    def decide(self, observed: Observations) -> Decision:
        z, counts = self.z_score(observed)
        index = observed.sample_index.cpu()
        evidence = self.evidence[index]
        evidence = torch.where(counts, self.memory * evidence + (1 - self.memory) * z, evidence)
        threshold = torch.where(self.excluded[index], self.leave, self.enter)
        device = observed.score.device
        return Decision(keep_mask=(evidence < threshold).to(device), threshold=threshold.to(device))

    def update(self, observed: Observations) -> None:
        z, counts = self.z_score(observed)
        is_reference = observed.group.cpu() == REFERENCE
        index, visited = observed.sample_index.cpu()[counts].unique(return_inverse=True)
        z = z[counts]
        visits = torch.zeros(len(index)).index_add_(0, visited, torch.ones_like(z))
        mean_z = torch.zeros(len(index)).index_add_(0, visited, z) / visits
        past = self.memory**visits  # several visits in one step weigh as much as in several steps
        self.evidence[index] = past * self.evidence[index] + (1 - past) * mean_z
        bound = torch.where(self.excluded[index], self.leave, self.enter)
        self.excluded[index] = self.evidence[index] >= bound

        learned = is_reference & observed.scored.cpu()
        bins = timestep_bin(observed.timesteps.cpu()[learned], self.num_timesteps, self.num_bins)
        self.reference.update(observed.score.cpu()[learned].clamp(min=1e-12).log(), bins)

    def state_dict(self) -> dict[str, Tensor]:
        return {"evidence": self.evidence, "excluded": self.excluded, "reference": self.reference.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if len(state["evidence"]) != len(self.evidence):
            raise ValueError(
                f"the checkpoint's exclusion rule knows {len(state['evidence'])} samples, this corpus has "
                f"{len(self.evidence)}; resume on the shards that the run was started with"
            )
        self.evidence, self.excluded = state["evidence"].clone(), state["excluded"].clone()
        self.reference.sums = state["reference"].clone()
