"""Running quantiles of bounded size that merge by adding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RunningQuantiles:
    """Quantiles of a value in each timestep bin, with exponential forgetting.

    A histogram of equal buckets for each bin: of log d it is DDSketch (Masson et al. 2019), whose error is
    relative in d. A quantile is the upper edge of the bucket that holds the exact one of the weighted values,
    so at most `width` above it, whatever their distribution, as long as it lies in [low, high]; values
    outside count at the border. The histograms of two parts add up to the histogram of the whole. An
    observation's weight halves after `half_life` further observations in its bin. Values that are not finite are
    passed over.

    Args:
        num_bins: timestep bins.
        low, high: range of the values.
        width: of a bucket.
        half_life: observations of a bin after which an older one counts half.
    """

    def __init__(self, num_bins: int, low: float, high: float, width: float, half_life: float):
        self.low, self.width = low, width
        self.decay = 0.5 ** (1 / half_life)
        self.counts = torch.zeros(num_bins, math.ceil((high - low) / width), dtype=torch.float64)

    def histogram(self, values: Tensor, bins: Tensor) -> Tensor:
        """Count how many of B values fall into each bucket of each bin; the parts of a whole may be added up.

        values (B,), bins (B,) int64 -> (num_bins, num_buckets) float64
        """
        num_buckets = self.counts.shape[1]
        values, bins = values.cpu().double(), bins.cpu()
        finite = values.isfinite()
        values, bins = values[finite], bins[finite]
        buckets = ((values - self.low) / self.width).floor().clamp(0, num_buckets - 1).long()
        flat = torch.zeros_like(self.counts).flatten()
        flat.index_add_(0, bins * num_buckets + buckets, torch.ones_like(buckets, dtype=torch.float64))
        return flat.view_as(self.counts)

    def add(self, histogram: Tensor) -> None:
        """Forget a little, then add what one step showed, `histogram` of all its observations."""
        self.counts *= self.decay ** histogram.sum(1, keepdim=True)
        self.counts += histogram

    def update(self, values: Tensor, bins: Tensor) -> None:
        """Learn from all observations of one step, taken together. values (B,), bins (B,) int64"""
        self.add(self.histogram(values, bins))

    @property
    def count(self) -> Tensor:
        """Effective number of observations of each bin. (num_bins,)"""
        return self.counts.sum(1)

    def quantile(self, share: float) -> Tensor:
        """The value below which `share` of a bin's observations lie, see `histogram_quantile`. (num_bins,)"""
        return histogram_quantile(self.counts, self.low, self.width, share)


def histogram_quantile(counts: Tensor, low: float, width: float, share: float) -> Tensor:
    """The value below which a fresh observation of the same distribution falls with probability >= `share`.

    As in conformal prediction (Vovk et al. 2005) it has rank share (n + 1) among n observations, and is inf
    where n are too few to have that rank. The upper edge of its bucket: values that are all alike lie below.

    counts (R, K), bucket k begins at low + k width -> (R,) float64
    """
    below = counts.cumsum(1)  # (R, K)
    rank = share * (below[:, -1:] + 1)
    bucket = torch.searchsorted(below, rank)[:, 0]
    return torch.where(bucket < counts.shape[1], low + width * (bucket.double() + 1), torch.inf)
