"""How well a score tells memorized prompts from others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from memtrain.core.statistics import auc, best_accuracy, bootstrap_interval, threshold_at_fpr, tpr_at_fpr


def check_labels(labels: Sequence[bool]) -> None:
    """Raises ValueError where one of the two classes is missing: nothing can be told apart."""
    if all(labels) or not any(labels):
        there, missing = ("memorized", "other") if all(labels) else ("other", "memorized")
        raise ValueError(
            f"labels: all {len(labels)} prompts are {there} and none is {missing}; give both, or leave the labels out"
        )


def separation(scores: np.ndarray, labels: np.ndarray, max_fprs: Sequence[float], samples: int = 1000) -> dict:
    """AUC, best accuracy, and for each allowed FPR the TPR and the threshold that reaches it.

    Args:
        scores, labels: (P,) float and bool.
        max_fprs: the FPR is at most these (never the nearest one).
        samples: of the bootstrap, for 95 % intervals.
    """
    values = torch.from_numpy(np.asarray(scores))
    chosen = torch.from_numpy(np.asarray(labels))
    positive, negative = values[chosen], values[~chosen]

    def figure(statistic) -> dict:
        low, high = bootstrap_interval(statistic, positive, negative, samples)
        return {"value": statistic(positive, negative), "low": low, "high": high}

    return {
        "memorized": len(positive),
        "other": len(negative),
        "auc": figure(auc),
        "best_accuracy": figure(best_accuracy),
        "at_fpr": [
            {
                "max_fpr": max_fpr,
                "tpr": figure(partial(tpr_at_fpr, max_fpr=max_fpr)),
                "threshold": threshold_at_fpr(negative, max_fpr),
            }
            for max_fpr in max_fprs
        ],
    }


def by_group(
    scores: np.ndarray, labels: np.ndarray, groups: Sequence[str], max_fprs: Sequence[float]
) -> dict[str, dict]:
    """The separation of each group's memorized prompts from all other prompts."""
    groups = np.array(groups, dtype=object)
    named = list(dict.fromkeys(groups[labels].tolist()))
    return {
        name: separation(scores[~labels | (groups == name)], labels[~labels | (groups == name)], max_fprs)
        for name in named
    }


def by_step(steps: np.ndarray, labels: np.ndarray) -> list[dict]:
    """AUC of each scored step alone and of the mean up to it. steps (P, n, k)"""
    means = torch.from_numpy(steps).double().mean(dim=1)  # (P, k)
    running = means.cumsum(dim=1) / torch.arange(1, means.shape[1] + 1)
    chosen = torch.from_numpy(labels)
    return [
        {
            "step": k + 1,
            "auc": auc(alone[chosen], alone[~chosen]),
            "auc_mean_to_here": auc(mean[chosen], mean[~chosen]),
        }
        for k, (alone, mean) in enumerate(zip(means.T, running.T, strict=True))
    ]
