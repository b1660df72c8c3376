"""Which samples look memorized, judged from a run's ledger after the fact.

A visit at high noise gives a z-score: how far log d lies above what the reference set scored at about the
same step and timestep, in its standard deviations. A sample's evidence is the mean of its z-scores, weighted
by the step: memorization grows, so that late visits tell more. How far evidence strays by chance depends on
the number of visits n: z = sample + visit, with variances a and b estimated on the reference set. So evidence
is compared as evidence / sqrt(a + b / n), and the p-value is its rank among the reference set's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memtrain.core.exclusion import GROUP_NAMES, REFERENCE, TRAINED
from memtrain.data.ledger import read_about, read_ledger

HIGH_NOISE = 0.7  # share of the schedule from which memorized samples stand out (METHOD.md, the trial)
NUM_BINS = 10  # of timesteps, over the whole schedule
_PERIOD_ROWS = 50  # rows to compare with that each bin of a period has, on average
_MAX_PERIODS = 50


@dataclass(frozen=True)
class Judged:
    """What a ledger says of its samples."""

    table: (
        pa.Table
    )  # key, group, visits, high_noise_visits, evidence, p_value, mean_score, excluded_share; worst first
    rows: int  # in the ledger
    steps: int  # from the first to the last in it
    sample: float  # share of the rows that the ledger holds
    compared_with: int  # samples whose own evidence gives the p-values
    has_reference: bool  # False: the run had no reference set, samples were compared with one another

    def suspects(self, false_positive_rate: float) -> pa.Table:
        """The rows of samples that look memorized; of others, this share is expected among them.

        Raises:
            ValueError: the rate is no share, or the reference set is too small to tell it.
        """
        if not 0 < false_positive_rate < 1:
            raise ValueError(f"--false-positive-rate is a share between 0 and 1, got {false_positive_rate:g}")
        finest = 1 / (self.compared_with + 1)
        if false_positive_rate < finest:
            raise ValueError(
                f"{self.compared_with} samples to compare with cannot tell a false-positive rate of "
                f"{false_positive_rate:g}; ask for at least {finest:.2g}, or raise reference.count or steps"
            )
        return self.table.filter(pc.field("p_value") <= false_positive_rate)


def judge(run: str | Path) -> Judged:
    """Evidence against every sample of a run that was scored at high noise.

    Raises:
        ValueError: there is no ledger, or no score at high noise in it.
    """
    about = read_about(run)
    table = read_ledger(run).to_table(columns=["step", "key", "group", "timestep", "score", "kept"])
    encoded = table["key"].dictionary_encode().combine_chunks()
    keys, sample = encoded.dictionary, encoded.indices.to_numpy()
    column = {name: table[name].to_numpy() for name in ("step", "timestep", "score", "kept")}
    group = np.zeros(len(keys), dtype=np.int64)  # of each sample
    group[sample] = pc.index_in(table["group"], pa.array(GROUP_NAMES)).to_numpy()
    step, score = column["step"], column["score"]  # NaN where it was not taken
    scored = np.isfinite(score)

    high = scored & (column["timestep"] >= HIGH_NOISE * about.num_timesteps)
    has_reference = bool((group[sample[high]] == REFERENCE).any())
    compared = group == (REFERENCE if has_reference else TRAINED)
    if not (high & compared[sample]).any():
        raise ValueError(f"{run}: the ledger has no scores at high noise to compare with; train longer")
    of = sample[high]
    log_score = np.log(np.maximum(score[high].astype(np.float64), 1e-12))
    bins = column["timestep"][high].astype(np.int64) * NUM_BINS // about.num_timesteps
    cells = _periods(step[high], compared[of], len(np.unique(bins))) * NUM_BINS + bins
    z, counts = z_scores(log_score, of, cells, compared)

    of, z, weight = (
        of[counts],
        z[counts],
        (step[high][counts] - step.min() + 1) / (step.max() - step.min() + 1),
    )
    visits = np.bincount(of, minlength=len(keys))
    judged = visits > 0
    if not (judged & compared).any():
        raise ValueError(f"{run}: too few scores at high noise to compare with; train longer")
    evidence, effective = weighted_means(z, weight, of, len(keys))
    between, within = variances(z, weight, of, judged & compared)
    strength = evidence / np.sqrt(between + within / effective)
    null = np.sort(strength[judged & compared])
    above = len(null) - np.searchsorted(null, strength, side="left")
    named = judged & (group != REFERENCE)
    # a sample that is itself compared with has itself in the count
    p_value = np.where(compared, above / len(null), (above + 1) / (len(null) + 1))

    all_visits = np.bincount(sample, minlength=len(keys))
    all_scored = np.bincount(sample[scored], minlength=len(keys))
    order = np.flatnonzero(named)[np.argsort(-strength[named], kind="stable")]
    columns = {
        "key": keys.take(pa.array(order)),
        "group": pa.array(GROUP_NAMES).take(pa.array(group[order])),
        "visits": all_visits[order],
        "high_noise_visits": visits[order],
        "evidence": evidence[order],
        "p_value": p_value[order],
        "mean_score": np.bincount(sample[scored], score[scored], minlength=len(keys))[order]
        / all_scored[order],
        "excluded_share": np.bincount(sample, ~column["kept"], minlength=len(keys))[order]
        / all_visits[order],
    }
    return Judged(
        pa.table(columns),
        rows=len(table),
        steps=int(step.max() - step.min()) + 1,
        sample=about.sample,
        compared_with=len(null),
        has_reference=has_reference,
    )


def _periods(step: np.ndarray, compared: np.ndarray, num_bins: int) -> np.ndarray:
    """Which period of training each row falls into; they have as many rows to compare with. (N,) int64"""
    number = int(np.clip(compared.sum() // (num_bins * _PERIOD_ROWS), 1, _MAX_PERIODS))
    bounds = np.quantile(step[compared], np.arange(1, number) / number)
    return np.searchsorted(bounds, step, side="right")


def z_scores(
    log_score: np.ndarray, sample: np.ndarray, cells: np.ndarray, compared: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How far each row lies above its cell's rows of samples to compare with, its own sample's left out.

    Args:
        log_score, sample, cells: (N,) of each row; samples and cells are numbered from 0.
        compared: (samples,) bool, whose rows make a cell's mean and standard deviation.

    Returns:
        z (N,), and (N,) bool, whether three rows at least were there to compare with.
    """

    def sums(
        where: np.ndarray, values: np.ndarray
    ) -> np.ndarray:  # (3, len(values)) of the rows with equal `where`
        _, place = np.unique(where, return_inverse=True)
        mine = compared[sample]
        return np.stack([np.bincount(place, mine * power)[place] for power in (1.0, values, values**2)])

    centred = log_score - log_score.mean()  # squares of small numbers lose nothing
    pairs = sample.astype(np.int64) * (cells.max() + 1) + cells
    count, total, squares = sums(cells, centred) - sums(pairs, centred)
    counts = count >= 3
    count = np.maximum(count, 3)
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0) * count / (count - 1)
    return (centred - mean) / np.sqrt(np.maximum(variance, 1e-12)), counts


def weighted_means(
    values: np.ndarray, weight: np.ndarray, sample: np.ndarray, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample's rows, and how many of equal weight vary as much: (sum w)^2 / sum w^2. (samples,)"""
    total = np.bincount(sample, weight, minlength=samples)
    squares = np.bincount(sample, weight**2, minlength=samples)
    has_rows = total > 0
    mean = np.divide(
        np.bincount(sample, values * weight, minlength=samples), total, out=np.zeros(samples), where=has_rows
    )
    return mean, np.divide(total**2, squares, out=np.ones(samples), where=has_rows)


def variances(z: np.ndarray, weight: np.ndarray, sample: np.ndarray, of: np.ndarray) -> tuple[float, float]:
    """Of z-scores between samples and within a sample's visits (one-way random effects, method of moments).

    Args:
        z, weight, sample: (N,) the z-scores, what they weigh in the sample's mean, and whose they are.
        of: (samples,) bool, those to estimate them on; each has a row.
    """
    mine = of[sample]
    mean, visits = weighted_means(z, np.ones_like(z), sample, len(of))
    evidence, effective = weighted_means(z, weight, sample, len(of))
    total = float(evidence[of].var(ddof=1)) if of.sum() > 1 else 1.0
    spare = visits[of].sum() - of.sum()
    if spare < 0.5:
        return 0.0, max(total, 1e-12)  # one visit each: there is nothing to tell apart
    within = float(((z[mine] - mean[sample[mine]]) ** 2).sum() / spare)
    return max(total - within * float((1 / effective[of]).mean()), 0.0), max(within, 1e-12)
