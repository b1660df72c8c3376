"""The last score of every sample, so that not every visit has to be scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memtrain.core.exclusion import Observations
from memtrain.core.scores import MAGNITUDE, SCORES
from memtrain.core.transfer import sent


def _zeros(count: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(count, dtype=dtype)


@dataclass(frozen=True)
class Scoring:
    """How visits are scored, and which of them; the others act on the sample's last score.

    Args:
        kinds: the scores that are taken, of `magnitude` and `anchored`.
        rule: the one of them that the exclusion rule goes by, and all else that acts on a single one.
        every: score at every k-th optimizer step; 0 never, for rules that need no score.
        every_visits: score a sample at every k-th of its visits, 1 to 255.
        timesteps: score only where lo <= t < hi; None: everywhere.
    """

    kinds: tuple[str, ...] = (MAGNITUDE,)
    rule: str = MAGNITUDE
    every: int = 1
    every_visits: int = 1
    timesteps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or not set(self.kinds) <= set(SCORES):
            raise ValueError(f"score.kinds must be some of {', '.join(SCORES)}, got {list(self.kinds)}")
        if self.rule not in self.kinds:
            raise ValueError(
                f"score.rule must be one of score.kinds={list(self.kinds)}, got {self.rule}; score=both takes both"
            )
        if self.every < 0:
            raise ValueError(f"score.every must be >= 0, got {self.every}; 0 is never")
        if not 1 <= self.every_visits <= 255:
            raise ValueError(f"score.every_visits must be in 1 to 255, got {self.every_visits}")
        if self.timesteps is not None and not (len(self.timesteps) == 2 and 0 <= self.timesteps[0] < self.timesteps[1]):
            raise ValueError(f"score.timesteps must be [lo, hi] with 0 <= lo < hi, got {list(self.timesteps)}")

    @property
    def second(self) -> str | None:
        """The score that is taken beside that of the rule; None: there is none."""
        return next((kind for kind in self.kinds if kind != self.rule), None)

    @property
    def remembers(self) -> bool:
        """Whether some visits act on an earlier score."""
        return self.every > 1 or self.every_visits > 1 or self.timesteps is not None


class ScoreMemory:
    """Knows of every sample which of its visits are due to be scored, and what it scored last.

    Duplicates share what is remembered. 7 bytes a sample: score (float32), the timestep it was taken at (int16),
    visits to wait (uint8). The first visit that is scored differs from sample to sample, so that every batch holds
    as many.

    Args:
        num_samples: positions in the corpus.
        scoring: which visits are scored.
        zeros: makes (n,) zeros of a dtype, such as `memtrain.training.machine.Machine.zeros`.
    """

    per_sample: tuple[str, ...] = ("score", "score_timestep", "wait")

    def __init__(self, num_samples: int, scoring: Scoring, zeros: Callable[[int, torch.dtype], Tensor] = _zeros):
        self.every_visits, self.timesteps = scoring.every_visits, scoring.timesteps
        self.score = zeros(num_samples, torch.float32).fill_(torch.nan)
        self.score_timestep = zeros(num_samples, torch.int16)
        self.wait = zeros(num_samples, torch.uint8)
        for turn in range(scoring.every_visits):
            self.wait[turn :: scoring.every_visits] = turn

    def due(self, picture: Tensor, timesteps: Tensor) -> Tensor:
        """Which of B visits are scored. (B,) bool, on the CPU"""
        due = self.wait[picture.cpu()] == 0
        if self.timesteps is None:
            return due
        low, high = self.timesteps
        timesteps = timesteps.cpu()
        return due & (timesteps >= low) & (timesteps < high)

    def recall(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The last score of these pictures, NaN where there is none, and its timestep.

        (B,) int64 -> (B,) float32, (B,) int64, all on the CPU
        """
        return self.score[picture], self.score_timestep[picture].long()

    def fill(self, observed: Observations, picture: Tensor | None = None) -> Observations:
        """Rows as they are; but those that were not scored now get their picture's last score, if there is one.

        Args:
            picture: the rows', (B,) int64 on the CPU, so that nobody waits for the device; None: asked for there.
        """
        known = self.recall(observed.picture.cpu() if picture is None else picture)
        last, last_timesteps = (sent(values, observed.picture.device) for values in known)
        remembered = observed.captioned & ~observed.scored & ~last.isnan()
        return replace(
            observed,
            score=torch.where(remembered, last, observed.score),
            known=observed.scored | remembered,
            score_timesteps=torch.where(remembered, last_timesteps, observed.score_timesteps),
        )

    def update(self, observed: Observations) -> None:
        """Note the visits of one optimizer step, all ranks, in the order of the global batch; the last one counts."""
        captioned, scored = observed.captioned.cpu(), observed.scored.cpu()
        index = observed.picture.cpu()
        visited = index[captioned].unique()
        self.wait[visited] -= (self.wait[visited] > 0).to(torch.uint8)
        sample, place = index[scored].unique(return_inverse=True)
        # of a picture that came several times, the row that came last: (pictures,)
        last = torch.zeros(len(sample), dtype=torch.long).scatter_reduce_(0, place, torch.arange(len(place)), "amax")
        self.score[sample] = observed.score.cpu()[scored][last]
        self.score_timestep[sample] = observed.timesteps.cpu()[scored][last].to(torch.int16)
        self.wait[sample] = self.every_visits - 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"score": self.score, "score_timestep": self.score_timestep, "wait": self.wait}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if len(state["score"]) != len(self.score):
            raise ValueError(
                f"the checkpoint remembers scores of {len(state['score'])} samples, this corpus has "
                f"{len(self.score)}; resume on the shards that the run was started with"
            )
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
