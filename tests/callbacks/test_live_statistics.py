"""Sums and histograms of the live score against the same figures from all rows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from memtrain.callbacks.curves import MemorizationCurves
from memtrain.callbacks.live_statistics import (
    LiveStatistics,
    auc_of_counts,
    quantile_of_counts,
    score_at,
    tpr_of_counts,
)
from memtrain.core.exclusion import CANARY, REFERENCE, TRAINED, Decision, FixedThreshold, Observations
from memtrain.core.statistics import auc, tpr_at_fpr
from tests.conftest import build_data, build_module, fit
from tests.support.callbacks import copies, table, validation


def observed(rows: int, seed: int = 0, **columns) -> Observations:
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(1000, (rows,), generator=generator)
    yes = torch.ones(rows, dtype=torch.bool)
    defaults = dict(
        sample_index=torch.arange(rows),
        picture=torch.arange(rows),
        copies=torch.ones(rows, dtype=torch.long),
        timesteps=timesteps,
        score=torch.rand(rows, generator=generator) * 3 + 0.01,
        loss=torch.rand(rows, generator=generator),
        group=torch.randint(3, (rows,), generator=generator),
        captioned=yes,
        scored=yes,
        known=yes,
        score_timesteps=timesteps,
        latent_numel=torch.full((rows,), 16),
        second_score=torch.zeros(rows),
    )
    return Observations(**(defaults | columns))


def statistics_of(*parts) -> LiveStatistics:
    statistics = LiveStatistics(1000, 0.7)
    for rows, kept, threshold in parts:
        statistics.add(rows, Decision(kept, threshold))
    return statistics


def test_auc_tpr_and_quantiles_of_counts_agree_with_those_of_the_scores():
    seen = observed(6000)
    seen.score[seen.group == CANARY] *= 1.4
    found = statistics_of((seen, torch.ones(6000).bool(), torch.full((6000,), torch.inf))).metrics()
    for suffix, chosen in (("", seen.timesteps >= 700), ("_all_timesteps", torch.ones(6000).bool())):
        canary, reference = (seen.score[(seen.group == g) & chosen] for g in (CANARY, REFERENCE))
        assert found[f"auc_live{suffix}"] == pytest.approx(auc(canary, reference), abs=2e-3)
        assert found[f"tpr_at_1pct_fpr_live{suffix}"] == pytest.approx(tpr_at_fpr(canary, reference), abs=0.02)
    mine = seen.score[seen.group == TRAINED]
    for q in (0.05, 0.5, 0.95):
        assert found[f"score_quantile/train/{q:.2f}"] == pytest.approx(mine.quantile(q).item(), rel=0.01)
    assert not any(name.startswith("threshold") for name in found)  # an infinite one is none


def test_separated_equal_and_single_counts():
    low, high = torch.zeros(1024), torch.zeros(1024)
    low[100], high[900] = 5, 3
    assert auc_of_counts(high, low) == 1 and auc_of_counts(low, high) == 0 and auc_of_counts(low, low) == 0.5
    assert tpr_of_counts(high, low) == 1 and tpr_of_counts(low, high) == 0 and tpr_of_counts(low, low) == 0
    assert score_at(torch.tensor(900)) <= quantile_of_counts(high, 0.5) <= score_at(torch.tensor(901))


def test_what_says_nothing_enters_no_curve():
    """Dropped captions count for the loss alone, unreadable samples for nothing, remembered scores not again."""
    no = torch.zeros(3, dtype=torch.bool)
    quiet = torch.tensor([False, True, False])
    seen = observed(
        3,
        group=torch.tensor([TRAINED, TRAINED, TRAINED]),
        captioned=torch.tensor([False, True, False]),
        scored=no,
        known=quiet,
        score=torch.tensor([0.0, 2.0, 0.0]),
        loss=torch.tensor([1.0, 2.0, 50.0]),
    )
    kept = torch.tensor([True, False, False])  # dropped caption, excluded by its remembered score, unreadable
    found = statistics_of((seen, kept, torch.full((3,), 1.5))).metrics()
    assert found["loss/all"] == 1.5 and found["loss/kept"] == 1 and found["loss/excluded"] == 2
    assert found["excluded/train"] == 1
    assert not any(name.startswith(("score", "threshold", "auc")) for name in found)


def test_scores_of_any_size_have_a_place_and_histograms_hold_every_score():
    seen = observed(6, group=torch.zeros(6).long(), score=torch.tensor([0.0, 1e-9, 0.3, 3.0, 50.0, 1e9]))
    statistics = statistics_of((seen, torch.ones(6).bool(), torch.ones(6)))
    counts, edges = statistics.score_histograms()["score_histogram/train"]
    assert counts.sum() == 6 and len(edges) == len(counts) + 1 and (edges.diff() > 0).all()
    many = observed(5000, group=torch.zeros(5000).long())
    counts, edges = statistics_of((many, torch.ones(5000).bool(), torch.ones(5000))).score_histograms()[
        "score_histogram/train"
    ]
    exact, _ = np.histogram(many.score.numpy(), edges.numpy())
    assert np.abs(counts.numpy().cumsum() - exact.cumsum()).max() < 0.02 * 5000


def test_two_halves_add_up_to_the_whole():
    parts = [
        (observed(40, seed), torch.arange(40) % 3 > 0, torch.where(torch.arange(40) % 2 > 0, 1.0, torch.inf))
        for seed in (1, 2)
    ]
    whole, halves = statistics_of(*parts), [statistics_of(part) for part in parts]
    torch.testing.assert_close(halves[0].flat + halves[1].flat, whole.flat)


def train_a_rank(pipeline: str, corpus: str, out: str, ranks: int) -> None:
    module = build_module(pipeline, FixedThreshold(1.1), reference_every=1, reference_batch=40)
    watching = [MemorizationCurves(every=3, high_noise=0.5), validation(), copies(every=3, max_rmse=1.98), table()]
    trainer = fit(module, build_data(corpus, 4), out, 6, accumulate=2 // ranks, callbacks=watching, ranks=ranks)
    if trainer.is_global_zero:
        found = {name: value.item() for name, value in trainer.callback_metrics.items()}
        found |= {f"memorized_at/{key}": step or -1 for key, step in watching[2].memorized_at(trainer).items()}
        found |= {f"{row.key} {row.generation} {row.nearest_key}": row.nearest_rmse for row in watching[2].rows}
        visited = watching[3].visited
        found |= {f"visits/{i}": n for i, n in zip(visited.index.tolist(), visited.sums[0], strict=True)}
        strength = watching[3]._evidence(module).tolist()
        found |= {f"z/{i}": z for i, z in zip(visited.index.tolist(), strength, strict=True)}
        Path(out, f"{ranks}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_ranks_log_what_one_logs(forks, pipeline_folder, corpus, tmp_path):
    found = []
    forks.call(train_a_rank, pipeline_folder, corpus, tmp_path, 2, log=tmp_path / "log", ranks=2)
    train_a_rank(pipeline_folder, corpus, tmp_path, 1)
    for ranks in (1, 2):
        found.append(json.loads((tmp_path / f"{ranks}.json").read_text()))
    one, two = found
    for figures in found:  # of the last micro-batch of rank 0, for the progress bar; and the clock's
        for name in ("loss", "score", "excluded", "samples_per_second", "scoring_share"):
            figures.pop(name, None)
    assert 0 < one["excluded/train"] < 1 and any(z for name, z in one.items() if name.startswith("z/"))
    assert len(one) > 150 and two == pytest.approx(one, rel=2e-3, abs=1e-3)
