"""How strongly a picture's visits say that it is memorized: one statistic, for a run that goes on and for its ledger.

A visit gives a z-score: how far x = log(score / sqrt(loss)), the statistic of `exclusion=evidence`, lies above what
the reference set showed at about the same time and timestep, in its standard deviations. By magnitude only visits at
high noise count. Two things are asked of a picture's z-scores: whether they are high, the later the more (memorization
grows), and whether they have risen since its first visits. How far either strays by chance depends on the visits: a
coefficient's variance is a + b / (sum of squares of what it is a coefficient of), with a, between pictures, and b,
between visits, estimated on the reference set. A picture's evidence is the larger of the two in standard deviations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrain.core.exclusion import log_score
from memtrain.core.scores import ANCHORED, MAGNITUDE

# share of the schedule from which a visit counts: d stands out at high noise alone, the anchored score everywhere
COUNTED_FROM = {MAGNITUDE: 0.7, ANCHORED: 0.0}
CLIP = 3.0  # no visit says more: the logarithm of an anchored score, which grows from 0, has no floor
SUMS = 6  # of each picture: visits, and sums over them of z, z^2, time, time^2 and time * z


def log_ratio(score: Tensor, loss: Tensor) -> Tensor:
    """What a visit shows, x = log(score / sqrt(loss)), finite where one is 0. (B,), (B,) -> (B,) float64, on the CPU"""
    return log_score(score) - log_score(loss) / 2


def columns_of(z: Tensor, time: Tensor) -> Tensor:
    """What each visit adds to the sums of its picture. (V,), (V,) -> (SUMS, V) float64"""
    z, time = z.double().clamp(-CLIP, CLIP), time.double()
    return torch.stack([torch.ones_like(z), z, z.square(), time, time.square(), time * z])


def sums_of(columns: Tensor, picture: Tensor, num_pictures: int) -> Tensor:
    """Sums over the visits of each picture. (C, V), (V,) int64 -> (C, num_pictures)"""
    return torch.zeros(len(columns), num_pictures, dtype=torch.float64).index_add_(1, picture, columns.double())


def evidence(sums: Tensor, compared: Tensor) -> Tensor:
    """The evidence against each picture: the larger of `level` and `rise`. (SUMS, N), (N,) bool -> (N,)"""
    return torch.maximum(level(sums, compared), rise(sums, compared))


def level(sums: Tensor, compared: Tensor) -> Tensor:
    """How high each picture's z-scores are, the later the more, in standard deviations of chance. (N,)

    Args:
        sums: (SUMS, N), see `columns_of`; time is in (0, 1], from the run's begin to its end.
        compared: (N,) bool, the reference set, or whatever chance is to be estimated on.
    """
    visits, _, z_squares, _, time_squares, products = sums
    return _strength(time_squares, products, z_squares, visits, compared, fitted=1)


def rise(sums: Tensor, compared: Tensor) -> Tensor:
    """How much each picture's z-scores have risen since its first visits, in standard deviations of chance. (N,)

    Takes what `level` takes.
    """
    visits, z, z_squares, time, time_squares, products = sums
    count = visits.clamp(min=1)
    centred = (time_squares - time.square() / count, products - time * z / count, z_squares - z.square() / count)
    return _strength(*centred, visits, compared, fitted=2)


def _strength(
    squares: Tensor, products: Tensor, z_squares: Tensor, visits: Tensor, compared: Tensor, fitted: int
) -> Tensor:
    """How strongly each picture's z follows x, in standard deviations of chance; 0 where that cannot be told.

    The coefficient of a picture is sum(x z) / sum(x^2), and by chance varies as a + b / sum(x^2): random effects,
    a and b by the method of moments (DerSimonian and Laird 1986).

    Args:
        squares, products, z_squares: (N,) sums over a picture's visits of x^2, x z and z^2.
        fitted: parameters of a picture that z - coefficient * x has lost.

    Returns:
        (N,)
    """
    told = squares > 1e-9
    precision = torch.where(told, squares, 1.0)
    coefficient = torch.where(told, products / precision, 0.0)
    some = compared & told
    if not some.any():
        return torch.zeros_like(squares)
    spare = visits[some].sum() - fitted * some.sum()
    residual = (z_squares - coefficient * products)[some].clamp(min=0)  # sums of (z - coefficient * x)^2
    explained = (coefficient.square() * precision)[some]  # a precision + b in the mean
    # with nothing to spare each coefficient rests on a single number, and all of its variance counts as b
    within = residual.sum() / spare if spare > 0 else explained.mean()
    between = ((explained - within).sum() / precision[some].sum()).clamp(min=0)
    return coefficient / (between + within / precision).clamp(min=1e-12).sqrt()
