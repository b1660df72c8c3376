"""Which samples look memorized, judged from a run's ledger after the fact.

A visit at high noise gives a z-score: how far x = log(d / sqrt(loss)), the statistic of `exclusion=evidence`,
lies above what the reference set showed at about the same step and timestep, in its standard deviations. Two
things are asked of a sample's z-scores: whether they are high, the later the more (memorization grows), and
whether they have risen since its first visits. How far either strays by chance depends on the visits: a
coefficient's variance is a + b / (sum of squares of what it is a coefficient of), with a, between samples, and
b, between visits, estimated on the reference set. A sample's evidence is the larger of the two in standard
deviations, and the p-value is its rank among the reference set's own.
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

    table: pa.Table  # key, group, visits, high_noise_visits, evidence, p_value, mean_score, excluded_share; worst first
    rows: int  # in the ledger
    steps: int  # from the first to the last in it
    sample: float  # share of the rows that the ledger holds
    compared_with: int  # samples whose own evidence gives the p-values
    has_reference: bool  # False: the run scored no reference set, samples were compared with one another

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
    table = read_ledger(run).to_table(columns=["step", "key", "group", "timestep", "score", "loss", "kept"])
    encoded = table["key"].dictionary_encode().combine_chunks()
    keys, sample = encoded.dictionary, encoded.indices.to_numpy()
    column = {name: table[name].to_numpy() for name in ("step", "timestep", "score", "loss", "kept")}
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
    x = _log(score[high]) - _log(column["loss"][high]) / 2
    bins = column["timestep"][high].astype(np.int64) * NUM_BINS // about.num_timesteps
    cells = _periods(step[high], compared[of], len(np.unique(bins))) * NUM_BINS + bins
    z, counts = z_scores(x, of, cells, compared)

    of, z = of[counts], z[counts]
    time = (step[high][counts] - step.min() + 1) / (step.max() - step.min() + 1)  # (0, 1] of the run
    visits = np.bincount(of, minlength=len(keys))
    judged = visits > 0
    if not (judged & compared).any():
        raise ValueError(f"{run}: too few scores at high noise to compare with; train longer")
    level = strength(z, time, of, judged & compared)
    rise = strength(centred(z, of), centred(time, of), of, judged & compared, fitted=2)
    evidence = np.maximum(level, rise)
    null = np.sort(evidence[judged & compared])
    above = len(null) - np.searchsorted(null, evidence, side="left")
    named = judged & (group != REFERENCE)
    # a sample that is itself compared with has itself in the count
    p_value = np.where(compared, above / len(null), (above + 1) / (len(null) + 1))

    all_visits = np.bincount(sample, minlength=len(keys))
    all_scored = np.bincount(sample[scored], minlength=len(keys))
    order = np.flatnonzero(named)[np.argsort(-evidence[named], kind="stable")]
    columns = {
        "key": keys.take(pa.array(order)),
        "group": pa.array(GROUP_NAMES).take(pa.array(group[order])),
        "visits": all_visits[order],
        "high_noise_visits": visits[order],
        "evidence": evidence[order],
        "p_value": p_value[order],
        "mean_score": np.bincount(sample[scored], score[scored], minlength=len(keys))[order] / all_scored[order],
        "excluded_share": np.bincount(sample, ~column["kept"], minlength=len(keys))[order] / all_visits[order],
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

    def sums(where: np.ndarray, values: np.ndarray) -> np.ndarray:  # (3, len(values)) of the rows with equal `where`
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


def centred(values: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Each row less the mean of its sample's rows. (N,)"""
    visits, total = np.bincount(sample), np.bincount(sample, values)
    return values - (total / np.maximum(visits, 1))[sample]


def strength(z: np.ndarray, x: np.ndarray, sample: np.ndarray, of: np.ndarray, fitted: int = 1) -> np.ndarray:
    """How strongly each sample's z follows x, in standard deviations of chance; 0 where that cannot be told.

    The coefficient of a sample is sum(x z) / sum(x^2), and by chance varies as a + b / sum(x^2): random effects,
    a and b by the method of moments (DerSimonian and Laird 1986).

    Args:
        z, x, sample: (N,) of each row.
        of: (samples,) bool, those to estimate a and b on.
        fitted: parameters of a sample that z - coefficient * x has lost.

    Returns:
        (samples,)
    """
    squares = np.bincount(sample, x**2, minlength=len(of))
    told = squares > 1e-9
    precision = np.where(told, squares, 1.0)
    coefficient = np.where(told, np.bincount(sample, x * z, minlength=len(of)) / precision, 0.0)
    some = of & told
    if not some.any():
        return np.zeros(len(of))
    mine = some[sample]
    spare = mine.sum() - fitted * some.sum()
    residual = z[mine] - coefficient[sample[mine]] * x[mine]
    # with nothing to spare each coefficient rests on a single number, and all of its variance counts as b
    explained = (coefficient**2 * precision)[some]  # a precision + b in the mean
    within = float((residual**2).sum() / spare if spare > 0 else explained.mean())
    between = max(float((explained - within).sum() / precision[some].sum()), 0.0)
    return coefficient / np.sqrt(np.maximum(between + within / precision, 1e-12))


def _log(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values.astype(np.float64), 1e-12))
