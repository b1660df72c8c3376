"""Rules with a running threshold for each timestep bin: a quantile of d, a false-positive rate, a mean loss.

A remembered score is held against the threshold of the timestep that it was taken at.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from memtrain.core.exclusion import (
    EXCLUDE,
    REFERENCE,
    Decision,
    ExclusionRule,
    Observations,
    at_least,
    log_score,
    open_share,
    reachable,
    restored,
    telling,
)
from memtrain.core.quantiles import RunningQuantiles, histogram_quantile
from memtrain.core.statistics import BinnedMoments, timestep_bin
from memtrain.core.trend import Trend

LOG_RANGE = {"low": -12.0, "high": 12.0, "width": 0.005}  # of log d: a bucket is half a percent of d
LEVEL_DEGREE = 4  # of log d over t
SPREAD_PRIOR = 100  # scores that a bin's own must outweigh
Z_RANGE = {"low": -12.0, "high": 12.0, "width": 0.01}  # of log d in standard deviations


def check_half_life(half_life: int, tail: float, name: str) -> None:
    """Raises ValueError where a tail needs more observations to be known than are ever remembered."""
    needed = math.ceil(math.log(2) / tail)
    if not half_life >= needed:
        raise ValueError(f"exclusion.half_life must be >= {needed} for exclusion.{name}, got {half_life}")


class BinnedThreshold(ExclusionRule):
    """A rule that leaves a sample out where d >= the running threshold of its timestep; a subclass has the thresholds.

    Args:
        num_bins: timestep bins over the whole schedule.
        warmup: observations that a threshold needs before it counts.
        start_step, action: of every rule.
    """

    learns = True

    def __init__(self, num_bins: int, warmup: int, start_step: int, action: str):
        super().__init__(start_step, action)
        at_least(1, num_bins=num_bins, warmup=warmup)
        self.num_bins, self.warmup = num_bins, warmup

    def setup(self, num_samples: int, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def bins(self, timesteps: Tensor) -> Tensor:
        """The bin of each timestep. (B,) int64 -> (B,) int64"""
        return timestep_bin(timesteps, self.num_timesteps, self.num_bins)

    @abstractmethod
    def threshold_at(self, timesteps: Tensor) -> Tensor:
        """The threshold at each timestep; what is not known yet keeps everything. (B,) int64 on the CPU -> (B,)"""

    def decide(self, observed: Observations) -> Decision:
        threshold = self.threshold_at(observed.score_timesteps.cpu()).float().to(observed.score.device)
        return Decision(keep_mask=observed.score < threshold, threshold=threshold)


class Quantile(BinnedThreshold):
    """`exclusion=quantile`: left out above a running quantile of what trained samples score in the same bin.

    MemControl (WACV 2025) takes the batch's 90 % quantile, which at batch size 1 is the sample itself; a
    running one does not depend on how the batch is cut.

    Args:
        quantile: share of the trained samples' scores that lie below the threshold, in (0, 1).
        half_life: observations of a bin after which an older one counts half.
        warmup: observations that a bin needs before its threshold counts.
    """

    def __init__(
        self, quantile: float, num_bins: int, half_life: int, warmup: int, start_step: int = 0, action: str = EXCLUDE
    ):
        super().__init__(num_bins, warmup, start_step, action)
        self.quantile = open_share("quantile", quantile, "0.9 leaves out the highest tenth")
        check_half_life(half_life, 1 - quantile, "quantile")
        reachable(warmup, half_life)
        self.scores = RunningQuantiles(num_bins, **LOG_RANGE, half_life=half_life)

    def threshold_at(self, timesteps: Tensor) -> Tensor:
        known = self.scores.count >= self.warmup
        return torch.where(known, self.scores.quantile(self.quantile).exp(), torch.inf)[self.bins(timesteps)]

    def update(self, observed: Observations) -> None:
        learned = telling(observed) & (observed.group.cpu() != REFERENCE)
        self.scores.update(log_score(observed.score)[learned], self.bins(observed.timesteps.cpu())[learned])

    def state_dict(self) -> dict[str, Tensor]:
        return {"scores": self.scores.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        (self.scores.counts,) = restored(state, scores=self.scores.counts)


class Calibrated(BinnedThreshold):
    """`exclusion=calibrated`: left out above what never-trained samples score at the same t, but for a share.

    The reference set gives few scores a bin, and they drift with the model. So log d is made a z-score, in
    three parts, the quickest resting on all scores: a level that is smooth in t and forgets quickly, each
    bin's offset and deviation from it, which forget slowly, and the quantile of the z-scores: of the bin's
    own, to which those of all bins are added with a weight of at most `pooling` scores. A score is judged by
    what was known before it, so the z-scores hold the error of level and deviation too.

    Args:
        false_positive_rate: share of never-trained samples' scores above the threshold, in (0, 1).
        level_half_life: reference scores, of any bin, after which an older one counts half in the level.
        half_life: reference scores of a bin after which an older one counts half in the rest.
        pooling: weight of all bins' z-scores in each bin's quantile, in scores.
        warmup: reference scores that the level needs, and then the deviation.
    """

    needs_reference = True

    def __init__(
        self,
        false_positive_rate: float,
        num_bins: int,
        level_half_life: int,
        half_life: int,
        pooling: int,
        warmup: int,
        start_step: int = 0,
        action: str = EXCLUDE,
    ):
        super().__init__(num_bins, warmup, start_step, action)
        self.false_positive_rate = open_share(
            "false_positive_rate", false_positive_rate, "0.01 leaves out one ordinary sample in a hundred"
        )
        if not level_half_life >= warmup:
            raise ValueError(f"exclusion.level_half_life must be >= exclusion.warmup ({warmup}), got {level_half_life}")
        at_least(0, pooling=pooling)
        check_half_life(half_life, false_positive_rate, "false_positive_rate")
        reachable(warmup, half_life, bins=num_bins)  # of all bins together
        self.pooling = pooling
        self.level = Trend(LEVEL_DEGREE, level_half_life)
        self.residuals = BinnedMoments(num_bins, half_life)
        self.z_scores = RunningQuantiles(num_bins, **Z_RANGE, half_life=half_life)

    def centre_and_deviation(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of log d of never-trained samples at these timesteps. (B,) -> (B,), (B,)

        A bin with few scores is taken to have no offset and the deviation that all bins have.
        """
        count, total, squares = self.residuals.sums  # (num_bins,) each
        shared = squares.sum() / count.sum().clamp(min=1e-12)
        offset = total / (count + SPREAD_PRIOR)
        variance = (squares + SPREAD_PRIOR * shared) / (count + SPREAD_PRIOR) - offset.square()
        deviation = variance.clamp(min=1e-12).sqrt()
        bins = self.bins(timesteps)
        return self.level.at(timesteps / self.num_timesteps) + offset[bins], deviation[bins]

    def threshold_at(self, timesteps: Tensor) -> Tensor:
        counts = self.z_scores.counts  # (num_bins, buckets)
        pooled = counts.sum(0)  # (buckets,)
        mixed = counts + pooled * (self.pooling / pooled.sum().clamp(min=max(self.pooling, 1)))
        z = histogram_quantile(mixed, Z_RANGE["low"], Z_RANGE["width"], 1 - self.false_positive_rate)
        centre, deviation = self.centre_and_deviation(timesteps)
        return (centre + deviation * z[self.bins(timesteps)]).exp()

    def update(self, observed: Observations) -> None:
        learned = telling(observed) & (observed.group.cpu() == REFERENCE)
        score, timesteps = log_score(observed.score)[learned], observed.timesteps.cpu()[learned]
        position, bins = timesteps / self.num_timesteps, self.bins(timesteps)
        # each part learns from what the parts before it said, as they were before this step
        if self.residuals.count.sum() >= self.warmup:
            centre, deviation = self.centre_and_deviation(timesteps)
            self.z_scores.update((score - centre) / deviation, bins)
        if self.level.count >= self.warmup:
            self.residuals.update(score - self.level.at(position), bins)
        self.level.update(score, position)

    def state_dict(self) -> dict[str, Tensor]:
        return {"level": self.level.sums, "residuals": self.residuals.sums, "z_scores": self.z_scores.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.level.sums, self.residuals.sums, self.z_scores.counts = restored(
            state, level=self.level.sums, residuals=self.residuals.sums, z_scores=self.z_scores.counts
        )


class IetAgc(BinnedThreshold):
    """`exclusion=iet_agc`: left out where the loss is below the bin's running mean / ratio; no extra forward.

    The loss skipping of IET-AGC (ECCV 2024). The mean is over every captioned row that is in the batch, the
    left-out ones too: without them it would rise, and leave out ever more.

    Args:
        ratio: lambda, above 1; 1.25 in the paper.
        half_life: observations of a bin after which an older one counts half.
    """

    needs_score = False

    def __init__(
        self, ratio: float, num_bins: int, half_life: int, warmup: int, start_step: int = 0, action: str = EXCLUDE
    ):
        super().__init__(num_bins, warmup, start_step, action)
        if not ratio > 1:
            raise ValueError(f"exclusion.ratio must be > 1, got {ratio:g}; the paper's is 1.25")
        at_least(1, half_life=half_life)
        reachable(warmup, half_life)
        self.ratio = ratio
        self.losses = BinnedMoments(num_bins, half_life)

    def threshold_at(self, timesteps: Tensor) -> Tensor:
        """The loss below which a sample is left out at each timestep; 0 where it is not known yet. (B,) -> (B,)"""
        known = self.losses.count >= self.warmup
        return torch.where(known, self.losses.mean / self.ratio, 0.0)[self.bins(timesteps)]

    def decide(self, observed: Observations) -> Decision:
        threshold = self.threshold_at(observed.timesteps.cpu()).float().to(observed.loss.device)
        return Decision(keep_mask=observed.loss >= threshold, threshold=threshold)

    def update(self, observed: Observations) -> None:
        learned = observed.captioned.cpu() & (observed.group.cpu() != REFERENCE)
        self.losses.update(observed.loss.cpu()[learned], self.bins(observed.timesteps.cpu())[learned])

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        (self.losses.sums,) = restored(state, losses=self.losses.sums)
