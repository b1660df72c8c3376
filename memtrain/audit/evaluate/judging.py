"""Which of a model's generations are copies: at a cut that the generations of the group reference set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memtrain.audit.evaluate.similarity import Similarity
from memtrain.core.copies import Cut
from memtrain.core.statistics import interval_over_groups
from memtrain.data.escaping import as_text


@dataclass(frozen=True)
class GroupResult:
    group: str
    samples: int
    generations: int
    copy_rate: float  # share of the generations that are copies of their own picture
    copy_rate_low: float | None  # 95 % by bootstrap over the samples; None: there is one alone
    copy_rate_high: float | None
    copy_rate_nearest: float  # share that are copies of any training picture
    samples_copied: float  # share of the samples with at least one copy
    similarity: float  # to their own picture, mean
    similarity_nearest: float  # to the nearest training picture: a twentieth of the generations is as near
    clip_score: float | None
    denoising_loss: float
    copy_rate_attacked: float | None = None  # of generations after an attack; None: there was none
    copy_rate_attacked_low: float | None = None
    copy_rate_attacked_high: float | None = None
    caption_margin: float | None = None  # of a judge
    copy_rate_beyond_reach: float | None = None  # of generations after an attack; None: its reach is not known


def nearest_column(similarity: Similarity) -> str:
    """The rows' column of how near the nearest training picture is."""
    return f"nearest_{similarity.column}"


def note_nearest(
    rows: Sequence[dict], features: Tensor, similarity: Similarity, blocks: Iterable[Tensor], key: Callable[[int], str]
) -> None:
    """Say in each row, of a generation, which training picture is the nearest, and how near it is.

    Args:
        features: of the generations, (Q, …).
        blocks: of the training pictures, some at a time.
        key: of the picture at a place among all that the blocks held.
    """
    values, which = similarity.nearest(features, blocks)
    keys = {place: as_text(key(place)) if place >= 0 else "" for place in sorted(set(which.tolist()))}
    for row, value, place in zip(rows, values.tolist(), which.tolist(), strict=True):
        row[nearest_column(similarity)], row["nearest_key"] = value, keys[place]


def judge(
    rows: Sequence[dict], reference: Sequence[bool], similarity: Similarity, false_copies: float
) -> tuple[Cut, float | None]:
    """Set the cut, and say in each row whether it is a copy: of its own picture, and of any training picture.

    An attack describes pictures, too, that a model has never seen, so that of its generations some lie within that cut
    by its doing alone. Its reach is the largest distance within which at most the share `false_copies` of its
    generations of never-trained pictures lie, and never above the cut: what is nearer, the model has learnt.

    Args:
        reference: of each row, whether its caption was never trained on.

    Returns:
        The cut, and the attack's reach, a distance as the cut's; None where no such caption was attacked.
    """

    def told(column: str, attacked: bool) -> Tensor:
        never = [row for row, is_reference in zip(rows, reference, strict=True) if is_reference]
        values = torch.tensor([row[column] for row in never if row["attacked"] == attacked], dtype=torch.float64)
        return values[values.isfinite()]

    cut, described = (
        similarity.cut(told(nearest_column(similarity), False), false_copies),
        told(similarity.column, True),
    )
    reach = min(cut.distance, similarity.cut(described, false_copies).distance) if len(described) else None
    flags = {"is_copy": (similarity.column, cut.distance), "is_copy_of_any": (nearest_column(similarity), cut.distance)}
    for row in rows:
        for name, (column, distance) in flags.items():
            row[name] = bool(similarity.is_copy(np.float64(row[column]), similarity.in_own_terms(distance)))
        row["is_beyond_reach"] = None
        if row["attacked"] and reach is not None:
            near = similarity.is_copy(np.float64(row[similarity.column]), similarity.in_own_terms(reach))
            row["is_beyond_reach"] = bool(near)
    return cut, reach


def summarise(rows: Sequence[dict], group: str, per_sample: int, similarity: Similarity) -> GroupResult:
    """What the generations of a group came to, `per_sample` of each of N samples, a sample's after another's."""
    mine = [row for row in rows if row["group"] == group and not row["attacked"]]
    attacked = [row for row in rows if row["group"] == group and row["attacked"]]
    nearest = np.array([row[nearest_column(similarity)] for row in mine])
    rate, low, high = _copy_rate(mine, per_sample)
    rate_attacked, low_attacked, high_attacked = _copy_rate(attacked, per_sample) if attacked else (None,) * 3

    def mean(column: str) -> float:
        return float(np.mean([row[column] for row in mine]))

    return GroupResult(
        group=group,
        samples=len(mine) // per_sample,
        generations=len(mine),
        copy_rate=rate,
        copy_rate_low=low,
        copy_rate_high=high,
        copy_rate_nearest=mean("is_copy_of_any"),
        samples_copied=float(_copies(mine, per_sample).any(axis=1).mean()),
        similarity=mean(similarity.column),
        similarity_nearest=float(np.quantile(nearest, 0.05 if similarity.is_distance else 0.95)),
        clip_score=None if mine[0]["clip_score"] is None else mean("clip_score"),
        denoising_loss=mean("denoising_loss"),
        copy_rate_attacked=rate_attacked,
        copy_rate_attacked_low=low_attacked,
        copy_rate_attacked_high=high_attacked,
        copy_rate_beyond_reach=_share([row["is_beyond_reach"] for row in attacked]),
        caption_margin=None if mine[0]["caption_margin"] is None else mean("caption_margin"),
    )


def _share(flags: Sequence[bool | None]) -> float | None:
    return float(np.mean(flags)) if flags and None not in flags else None


def _copies(rows: Sequence[dict], per_sample: int) -> np.ndarray:
    """(N, G) bool, which generations of each sample are copies of its picture."""
    return np.array([row["is_copy"] for row in rows]).reshape(-1, per_sample)


def _copy_rate(rows: Sequence[dict], per_sample: int) -> tuple[float, float | None, float | None]:
    """The share of copies, and its interval by bootstrap over samples, None where there is one sample alone."""
    copies = _copies(rows, per_sample)
    sample = torch.arange(len(copies)).repeat_interleave(per_sample)  # of each generation
    low, high = interval_over_groups(torch.from_numpy(copies).flatten(), sample)
    return float(copies.mean()), None if np.isnan(low) else low, None if np.isnan(high) else high
