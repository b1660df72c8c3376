"""Statistics of scores: separation of two groups, and running moments per timestep bin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def timestep_bin(timesteps: Tensor, num_timesteps: int, num_bins: int) -> Tensor:
    """Which of `num_bins` equal bins of [0, num_timesteps) each timestep falls into. (B,) int64"""
    return timesteps * num_bins // num_timesteps


def auc(positive: Tensor, negative: Tensor) -> float:
    """P(positive > negative) + P(equal) / 2: the area under the ROC curve (Mann & Whitney 1947).

    `nan` when a group is empty. (P,), (N,) -> float
    """
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False)
    not_above = torch.searchsorted(ordered, positive, right=True)
    return ((below + not_above).cpu().double() / 2 / len(negative)).mean().item()


def tpr_at_fpr(positive: Tensor, negative: Tensor, max_fpr: float = 0.01) -> float:
    """The largest true-positive rate among thresholds whose false-positive rate does not exceed `max_fpr`.

    A score counts as positive at or above the threshold. `nan` when a group is empty.
    """
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    allowed = int(max_fpr * len(negative) + 1e-9)  # negatives that may lie at or above the threshold
    bar = negative.sort(descending=True).values[allowed] if allowed < len(negative) else -torch.inf
    return (positive > bar).cpu().double().mean().item()


def threshold_at_fpr(negative: Tensor, max_fpr: float = 0.01) -> float:
    """The lowest threshold whose false-positive rate does not exceed `max_fpr`: positive is at or above it.

    It is the value next above the highest negative that may not pass, so at it the true-positive rate is
    `tpr_at_fpr`. `nan` when there is no negative.
    """
    if len(negative) == 0:
        return float("nan")
    allowed = int(max_fpr * len(negative) + 1e-9)  # negatives that may lie at or above the threshold
    if allowed >= len(negative):
        return float("-inf")
    bar = negative.sort(descending=True).values[allowed]
    return torch.nextafter(bar, torch.full_like(bar, torch.inf)).item()


def best_accuracy(positive: Tensor, negative: Tensor) -> float:
    """The largest share of right answers among all thresholds; positive is at or above the threshold.

    With groups of unequal size it is at least the larger group's share. `nan` when a group is empty.
    """
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    # one threshold at each score, and one above all: (T,); how many of each group are right at it
    thresholds = torch.cat([positive, negative, positive.new_tensor([torch.inf])])
    right = len(positive) - torch.searchsorted(positive.sort().values, thresholds, right=False)
    right = right + torch.searchsorted(negative.sort().values, thresholds, right=False)
    return (right.max() / (len(positive) + len(negative))).item()


def bootstrap_interval(
    statistic: Callable[[Tensor, Tensor], float],
    positive: Tensor,
    negative: Tensor,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `statistic(positive, negative)`, both groups drawn anew (Efron 1979).

    `nan` when a group is empty. The same seed gives the same interval.
    """
    if len(positive) == 0 or len(negative) == 0:
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    draws = [
        [group[torch.randint(len(group), (len(group),), generator=generator)] for group in (positive, negative)]
        for _ in range(samples)
    ]
    values = torch.tensor([statistic(*drawn) for drawn in draws], dtype=torch.float64)
    tail = (1 - level) / 2
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def interval_over_groups(
    values: Tensor, groups: Tensor, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `values`, whole groups drawn anew with all that is theirs (Efron 1979).

    Values of one group are not independent of one another: generations of one canary are copies together or not.
    `nan` where there are fewer than two groups, of which no spread can be told. The same seed gives the same interval.

    Args:
        values: (N,)
        groups: (N,) which group each belongs to, any integers.
    """
    _, group = groups.unique(return_inverse=True)
    count = int(group.max()) + 1 if len(group) else 0
    if count < 2:
        return float("nan"), float("nan")
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, group, values.double())
    sizes = torch.bincount(group, minlength=count).double()
    drawn = torch.randint(count, (samples, count), generator=torch.Generator().manual_seed(seed))
    means = sums[drawn].sum(dim=1) / sizes[drawn].sum(dim=1)  # (samples,)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³: KID (Binkowski et al. 2018).

    Of samples of one distribution its mean is 0, however few they are, so that it may come out negative; a Fréchet
    distance of few samples is too high. `nan` where either side has fewer than two. (M, D), (N, D) -> float
    """
    if min(len(one), len(other)) < 2:
        return float("nan")
    one, other = one.double(), other.double()

    def total(left: Tensor, right: Tensor) -> float:
        """The kernel, added up over all pairs, some rows at a time."""
        return sum((rows @ right.T / right.shape[1] + 1).pow(3).sum().item() for rows in left.split(1024))

    def within(side: Tensor) -> float:
        """The kernel's mean over all pairs of different rows."""
        own = (side.square().mean(dim=1) + 1).pow(3).sum().item()
        return (total(side, side) - own) / (len(side) * (len(side) - 1))

    return within(one) + within(other) - 2 * total(one, other) / (len(one) * len(other))


def most_remembered(half_life: float) -> float:
    """The limit 1 / (1 - decay) of a count with exponential forgetting, which it never reaches.

    With one observation at a time; about half_life / log 2.
    """
    return 1 / (1 - 0.5 ** (1 / half_life))


class BinnedMoments:
    """Mean and standard deviation of a score in each timestep bin, with exponential forgetting.

    An observation's weight halves after `half_life` further observations in its bin, so that the moments
    follow a model that is being trained; until then they are the plain moments. Values that are not finite are
    passed over.
    """

    def __init__(self, num_bins: int, half_life: float):
        self.decay = 0.5 ** (1 / half_life)
        self.sums = torch.zeros(3, num_bins, dtype=torch.float64)  # weight, weighted sum, sum of squares

    def update(self, values: Tensor, bins: Tensor) -> None:
        """Learn from all observations of one step, taken together. values (B,), bins (B,) int64"""
        values, bins = values.cpu().double(), bins.cpu()
        finite = values.isfinite()
        values, bins = values[finite], bins[finite]
        counts = torch.zeros_like(self.sums[0]).index_add_(0, bins, torch.ones_like(values))
        self.sums *= self.decay**counts
        self.sums[0] += counts
        self.sums[1].index_add_(0, bins, values)
        self.sums[2].index_add_(0, bins, values.square())

    @property
    def count(self) -> Tensor:
        """Effective number of observations of each bin. (num_bins,)"""
        return self.sums[0]

    @property
    def mean(self) -> Tensor:
        """Mean of each bin, 0 where there is no observation. (num_bins,)"""
        return self.sums[1] / self.sums[0].clamp(min=1e-12)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each bin, about 0 where there is no observation. (num_bins,)"""
        variance = self.sums[2] / self.sums[0].clamp(min=1e-12) - self.mean.square()
        return variance.clamp(min=1e-12).sqrt()
