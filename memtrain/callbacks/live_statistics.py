"""What the steps since the last point showed: sums and histograms of fixed size, on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memtrain.core.exclusion import CANARY, GROUP_NAMES, REFERENCE, Decision, Observations
from memtrain.core.statistics import timestep_bin

# the figures that are summed: how many rows were read, their losses, how many were kept, ...
ROWS, LOSS, KEPT, KEPT_LOSS, CAPTIONED, EXCLUDED, SCORED, SCORE, HELD, THRESHOLD = range(10)
TIMESTEP_BINS = 10
SCORE_BINS, LOWEST, HIGHEST = 1024, -4.0, 4.0  # of log10(score): a bin is 1.8 % wide
QUANTILES = (0.05, 0.5, 0.95)
_GROUPS = len(GROUP_NAMES)
_SUMS = (10, 2, _GROUPS, TIMESTEP_BINS)  # (F, noise, G, T)
_HISTOGRAM = (2, _GROUPS, SCORE_BINS)


class LiveStatistics:
    """What rows showed, as sums and counts whose size does not depend on how many rows there were.

    `sums` is (F, 2, G, T): one of the figures ROWS to THRESHOLD, low or high noise, group, timestep bin. `histogram`
    is (2, G, SCORE_BINS), counts of scores.

    A caption that was dropped says nothing (docs/method.md): its row counts for the loss alone. A sample that
    could not be read counts for nothing. `flat` holds all of it, so that one all-reduce adds up the ranks;
    its last element is free for the caller.

    Args:
        num_timesteps: of the schedule.
        high_noise: timesteps from this share of the schedule on are high noise.
        flat: what another one held, else zeros on `device`.
    """

    def __init__(
        self,
        num_timesteps: int,
        high_noise: float,
        device: torch.device | str = "cpu",
        flat: Tensor | None = None,
    ):
        self.num_timesteps, self.high_noise = num_timesteps, high_noise
        sums, cells = math.prod(_SUMS), math.prod(_HISTOGRAM)
        self.flat = torch.zeros(sums + cells + 1, device=device) if flat is None else flat
        self.sums = self.flat[:sums].view(_SUMS)
        self.histogram = self.flat[sums:-1].view(_HISTOGRAM)

    def add(self, observed: Observations, decision: Decision) -> None:
        """Add N rows, and what the rule said of them."""
        kept, threshold = decision.keep_mask, decision.threshold
        # the others could not be read, or are left out at a dropped caption, which is not counted
        rows = observed.captioned | kept
        held = observed.captioned & threshold.isfinite()
        held &= observed.scored | ~observed.known  # a remembered score met the threshold of its own timestep
        # the figures in their order: which rows count for each, and what they add; None: 1
        columns = (
            (rows, None),
            (rows, observed.loss),
            (kept, None),
            (kept, observed.loss),
            (observed.captioned, None),
            (observed.captioned & ~kept, None),
            (observed.scored, None),
            (observed.scored, observed.score),
            (held, None),
            (held, threshold),
        )
        values = torch.stack([m.float() if v is None else torch.where(m, v, 0.0) for m, v in columns])
        # (N,) places in the flattened (noise, G), then (noise, G, T) and (noise, G, SCORE_BINS)
        pool = (observed.timesteps >= self.high_noise * self.num_timesteps).long() * _GROUPS + observed.group
        cell = pool * TIMESTEP_BINS + timestep_bin(observed.timesteps, self.num_timesteps, TIMESTEP_BINS)
        self.sums.view(_SUMS[0], -1).index_add_(1, cell, values)
        place = (observed.score.clamp(min=1e-30).log10() - LOWEST) / (HIGHEST - LOWEST) * SCORE_BINS
        cell = pool * SCORE_BINS + place.long().clamp(0, SCORE_BINS - 1)
        self.histogram.view(-1).index_add_(0, cell, observed.scored.float())

    def metrics(self) -> dict[str, float]:
        """All figures by their names in `metrics.csv`; those of no row at all are left out."""
        everywhere, by_timestep = self.sums.sum((1, 3)), self.sums.sum(1)  # (F, G), (F, G, T)
        high_noise = self.sums[:, 1].sum(2)  # (F, G)
        trained = [group for group in range(_GROUPS) if group != REFERENCE]
        rows, loss, kept, kept_loss = everywhere[:4, trained].sum(1).tolist()
        # by name, a sum and what it is divided by
        found = {
            "loss/all": (loss, rows),
            "loss/kept": (kept_loss, kept),
            "loss/excluded": (loss - kept_loss, rows - kept),
        }
        for group, name in enumerate(GROUP_NAMES):
            of, noisy = everywhere[:, group].tolist(), high_noise[:, group].tolist()
            found[f"loss/{name}"] = (of[LOSS], of[ROWS])
            found[f"excluded/{name}"] = (of[EXCLUDED], of[CAPTIONED])
            found[f"score/{name}"] = (of[SCORE], of[SCORED])
            found[f"score_high_noise/{name}"] = (noisy[SCORE], noisy[SCORED])
        starts = [bin_ * self.num_timesteps // TIMESTEP_BINS for bin_ in range(TIMESTEP_BINS)]
        for number, start in enumerate(starts):
            for group, name in enumerate(GROUP_NAMES):
                of = by_timestep[:, group, number].tolist()
                found[f"score_by_timestep/{name}/t{start:03d}"] = (of[SCORE], of[SCORED])
                found[f"excluded_by_timestep/{name}/t{start:03d}"] = (of[EXCLUDED], of[CAPTIONED])
            held, threshold = by_timestep[HELD : THRESHOLD + 1, :, number].sum(1).tolist()
            found[f"threshold_by_timestep/t{start:03d}"] = (threshold, held)
        shares = {name: part / whole for name, (part, whole) in found.items() if whole > 0.5}
        return shares | self._of_histograms()

    def score_metrics(self) -> dict[str, float]:
        """Those of the `metrics` that are of scores alone."""
        return {name: value for name, value in self.metrics().items() if name.startswith(("score", "auc_", "tpr_"))}

    def _of_histograms(self) -> dict[str, float]:
        """Figures of the histograms: quantiles, and how well one score tells canaries from the reference set."""
        found = {}
        for suffix, counts in (("", self.histogram.sum(0)), ("_high_noise", self.histogram[1])):
            for group, name in enumerate(GROUP_NAMES):
                for q in QUANTILES if counts[group].sum() > 0 else ():
                    found[f"score_quantile{suffix}/{name}/{q:.2f}"] = quantile_of_counts(counts[group], q)
        for suffix, counts in (("", self.histogram[1]), ("_all_timesteps", self.histogram.sum(0))):
            if counts[CANARY].sum() > 0 and counts[REFERENCE].sum() > 0:
                found[f"auc_live{suffix}"] = auc_of_counts(counts[CANARY], counts[REFERENCE])
                found[f"tpr_at_1pct_fpr_live{suffix}"] = tpr_of_counts(counts[CANARY], counts[REFERENCE])
        return found

    def score_histograms(self, bars: int = 64) -> dict[str, tuple[Tensor, Tensor]]:
        """Histograms to be drawn, by name: counts (bars,) and edges (bars + 1,), which are evenly spaced."""
        found = {}
        for suffix, counts in (("", self.histogram.sum(0)), ("_high_noise", self.histogram[1])):
            for group, name in enumerate(GROUP_NAMES):
                # from bins that are even in log d to bars that are even in d, each bin by its middle
                seen = counts[group].nonzero()[:, 0]
                if len(seen) == 0:
                    continue
                ends = score_at(torch.tensor([seen[0], seen[-1] + 1]))
                edges = torch.linspace(*ends.tolist(), bars + 1, dtype=torch.float64)
                bar = (torch.searchsorted(edges, score_at(seen + 0.5)) - 1).clamp(0, bars - 1)
                heights = torch.zeros(bars, dtype=torch.float64)
                heights.index_add_(0, bar, counts[group][seen].double())
                found[f"score_histogram{suffix}/{name}"] = (heights, edges)
        return found


def score_at(place: Tensor) -> Tensor:
    """The score at a place on the histogram's axis, in bins from its left end. float64"""
    return 10.0 ** (LOWEST + (HIGHEST - LOWEST) * place.double() / SCORE_BINS)


def quantile_of_counts(counts: Tensor, q: float) -> float:
    """The score below which a share q of the counts (SCORE_BINS,) lies; within half a bin, 0.9 %."""
    below = counts.double().cumsum(0)
    target = q * below[-1]
    number = int(torch.searchsorted(below, target).clamp(max=SCORE_BINS - 1))
    inside = 1 - (below[number] - target) / counts[number].double().clamp(min=1e-12)
    return score_at(number + inside.clamp(0, 1)).item()


def auc_of_counts(positive: Tensor, negative: Tensor) -> float:
    """The area under the ROC curve of two groups' counts; scores that share a bin are ties. (SCORE_BINS,) x 2 -> float

    `core.statistics.auc` is that of the scores themselves.
    """
    positive, negative = positive.double(), negative.double()
    below = negative.cumsum(0) - negative
    return ((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum())).item()


def tpr_of_counts(positive: Tensor, negative: Tensor, max_fpr: float = 0.01) -> float:
    """The largest true-positive rate at a bounded false-positive rate; thresholds are the bins' lower ends.

    `core.statistics.tpr_at_fpr` is that of the scores themselves. (SCORE_BINS,) x 2 -> float
    """
    positive, negative = positive.double(), negative.double()
    false = negative.flip(0).cumsum(0).flip(0)  # negatives at or above each bin's lower end
    true = positive.flip(0).cumsum(0).flip(0)
    allowed = false <= max_fpr * negative.sum() + 1e-9
    return (torch.where(allowed, true, 0.0).max() / positive.sum()).item()
