"""Amortised scoring: what is remembered of a sample, when it is scored again, and what that decides."""

import math

import numpy as np
import pytest
import torch

from memtrain.core.exclusion import TRAINED, FixedThreshold, Observations
from memtrain.training.checkpoint import checkpoint
from memtrain.training.score_memory import ScoreMemory, Scoring
from tests.conftest import build_data, build_module, fit, weights
from tests.support.training import KillAt, Killed, Record


def visits(index, score=1.0, timesteps=500, captioned=True, scored=True) -> Observations:
    """Of samples in one optimizer step; each value is one for all rows, or one a row."""
    index = torch.as_tensor(index)
    values = (score, timesteps, captioned, scored)
    score, timesteps, captioned, scored = (torch.as_tensor(value).expand(len(index)) for value in values)
    return Observations.of_visit(
        sample_index=index,
        picture=index,
        copies=torch.ones_like(index),
        timesteps=timesteps,
        score=score.float(),
        loss=score.float(),
        group=torch.full_like(index, TRAINED),
        captioned=captioned,
        scored=scored & captioned,
        latent_numel=torch.full_like(index, 16),
    )


def visit(memory: ScoreMemory, index, **values) -> torch.Tensor:
    """One step of one micro-batch: who is due is scored, and noted. Returns who was due."""
    index = torch.as_tensor(index)
    timesteps = torch.as_tensor(values.pop("timesteps", 500)).expand(len(index))
    due = memory.due(index, timesteps)
    memory.update(visits(index, timesteps=timesteps, scored=due, **values))
    return due


# ---- the memory


def test_a_sample_costs_at_most_eight_bytes():
    state = ScoreMemory(1000, Scoring(every_visits=4)).state_dict()
    assert sum(tensor.nbytes for tensor in state.values()) <= 8 * 1000


@pytest.mark.parametrize("order", ["epochs", "with repeats", "one by one"])
def test_a_quarter_of_the_visits_is_scored_whatever_the_order(order):
    rng, memory, samples = np.random.default_rng(0), ScoreMemory(24, Scoring(every_visits=4)), 24
    count = {"epochs": 24, "with repeats": 16, "one by one": 1}[order]
    due, seen = np.zeros(samples, int), np.zeros(samples, int)
    for _ in range(4800 // count):
        index = rng.permutation(samples) if order == "epochs" else rng.choice(samples, count, replace=False)
        found = visit(memory, index)
        np.add.at(due, index, found.numpy())
        np.add.at(seen, index, 1)
    assert due.sum() == pytest.approx(seen.sum() / 4, abs=samples)
    assert (np.abs(due - seen / 4) <= 1).all()  # of each sample


def test_every_batch_of_an_epoch_in_order_holds_as_many():
    memory = ScoreMemory(64, Scoring(every_visits=4))
    assert [int(visit(memory, range(first, first + 8)).sum()) for first in range(0, 64, 8)] == [2] * 8


def test_a_visit_without_a_caption_counts_for_nothing():
    memory = ScoreMemory(1, Scoring(every_visits=2))
    due = [bool(visit(memory, [0], captioned=captioned)) for captioned in (True, True, False, True, True)]
    # scored, passed over, (due only if a caption were there to wait for), due again
    assert due[:2] == [True, False] and due[3:] == [True, False]


def test_a_score_outside_of_the_range_is_not_taken_and_is_taken_at_the_next_visit_inside():
    memory = ScoreMemory(1, Scoring(every_visits=2, timesteps=(700, 1000)))
    due = [bool(visit(memory, [0], timesteps=t)) for t in (699, 1000, 700, 999, 699, 999)]
    assert due == [False, False, True, False, False, True]


def test_the_last_score_of_a_step_is_remembered_and_where_it_was_taken():
    memory = ScoreMemory(6, Scoring(every_visits=2))
    memory.update(
        visits(
            [5, 2, 5, 5],
            score=[1.0, 2.0, 3.0, 4.0],
            timesteps=[10, 20, 30, 999],
            scored=[True, True, True, False],
        )
    )
    score, timesteps = memory.recall(torch.tensor([5, 2, 0]))
    assert score[:2].tolist() == [3.0, 2.0] and score[2].isnan()
    assert timesteps[:2].tolist() == [30, 20]


def test_a_state_of_another_corpus_is_refused():
    state = ScoreMemory(5, Scoring(every_visits=2)).state_dict()
    with pytest.raises(ValueError, match="remembers scores of 5 samples, this corpus has 6"):
        ScoreMemory(6, Scoring(every_visits=2)).load_state_dict(state)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"every": -1}, r"score\.every must be >= 0, got -1"),
        ({"every_visits": 0}, r"score\.every_visits must be in 1 to 255, got 0"),
        ({"every_visits": 256}, r"score\.every_visits must be in 1 to 255, got 256"),
        ({"timesteps": (5, 5)}, r"score\.timesteps must be \[lo, hi\] with 0 <= lo < hi, got \[5, 5\]"),
        ({"timesteps": (5,)}, r"score\.timesteps must be"),
    ],
)
def test_wrong_values_are_named(values, says):
    with pytest.raises(ValueError, match=says):
        Scoring(**values)


# ---- in training


def run(
    pipeline,
    corpus,
    path,
    steps,
    scoring,
    exclusion=None,
    batch_size=4,
    accumulate=1,
    callbacks=(),
    **options,
):
    module, record = build_module(pipeline, exclusion, scoring=scoring, **options), Record()
    data = build_data(corpus, batch_size)
    fit(module, data, path, steps, accumulate, callbacks=[record, *callbacks])
    return module, record


def test_scoring_every_visit_through_the_memory_is_plain_scoring(pipeline_folder, corpus, tmp_path):
    """A range that spans the schedule goes through the memory, and changes no bit."""
    rule = lambda: FixedThreshold(2.0)  # noqa: E731
    plain, expected = run(pipeline_folder, corpus, tmp_path, 4, Scoring(every_visits=1), rule())
    whole, found = run(pipeline_folder, corpus, tmp_path, 4, Scoring(timesteps=(0, 1000)), rule())
    assert plain.memory is None and whole.memory is not None
    for a, b in zip(expected.observed, found.observed, strict=True):
        assert torch.equal(a.scored, b.scored) and torch.equal(a.known, b.known)
        # rows without a caption are scored beside the others in the one, and left out of the batch in the other
        torch.testing.assert_close(a.score, b.score, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(expected.kept, found.kept, strict=True))
    assert torch.equal(weights(plain), weights(whole))


def test_a_remembered_score_excludes_at_visits_that_are_not_scored(pipeline_folder, corpus, tmp_path):
    _, record = run(pipeline_folder, corpus, tmp_path, 24, Scoring(every_visits=4), FixedThreshold(1e-6))
    observed, kept = Observations.concatenate(record.observed), torch.cat(record.kept)
    remembered = observed.known & ~observed.scored
    assert remembered.sum() > 10
    assert not kept[observed.known].any()  # every score is above the threshold
    assert kept[~observed.known].all()  # never scored, or no caption: nothing is known
    last = {}
    for row, index in enumerate(observed.sample_index.tolist()):
        if remembered[row]:
            assert (observed.score[row].item(), observed.score_timesteps[row].item()) == last[index]
        if observed.scored[row]:
            last[index] = (observed.score[row].item(), observed.timesteps[row].item())


def test_a_range_restricts_what_is_scored(pipeline_folder, corpus, tmp_path):
    scoring = Scoring(timesteps=(700, 1000))
    _, record = run(pipeline_folder, corpus, tmp_path, 8, scoring, FixedThreshold(math.inf), caption_dropout=0.0)
    observed = Observations.concatenate(record.observed)
    inside = observed.timesteps >= 700
    assert torch.equal(observed.scored, inside) and inside.any() and not inside.all()
    assert (observed.score_timesteps[observed.known] >= 700).all()
    assert (observed.score[observed.scored] > 0).all() and (observed.score[~observed.known] == 0).all()


def test_scoring_every_third_step_acts_on_what_is_remembered(pipeline_folder, corpus, tmp_path):
    _, record = run(pipeline_folder, corpus, tmp_path, 8, Scoring(every=3), FixedThreshold(1e-6), caption_dropout=0.0)
    for step, (observed, kept) in enumerate(zip(record.observed, record.kept, strict=True)):
        assert observed.scored.all() if step % 3 == 0 else not observed.scored.any()
        assert torch.equal(kept, ~observed.known)


def test_accumulation_decides_as_the_big_batch(pipeline_folder, corpus, tmp_path):
    options = dict(exclusion=FixedThreshold(1.0), reference_every=1000)
    big, record = run(pipeline_folder, corpus, tmp_path, 8, Scoring(every_visits=2), batch_size=8, **options)
    cut, cut_record = run(
        pipeline_folder, corpus, tmp_path, 8, Scoring(every_visits=2), batch_size=4, accumulate=2, **options
    )
    assert torch.equal(torch.cat(record.kept), torch.cat(cut_record.kept))
    assert torch.equal(big.memory.wait, cut.memory.wait)
    torch.testing.assert_close(big.memory.score, cut.memory.score, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_resumed_equals_uninterrupted(pipeline_folder, corpus, tmp_path):
    scoring, rule = Scoring(every_visits=3), lambda: FixedThreshold(1.0)
    whole, expected = run(pipeline_folder, corpus, tmp_path / "whole", 9, scoring, rule())
    module, data = build_module(pipeline_folder, rule(), scoring=scoring), build_data(corpus)
    with pytest.raises(Killed):
        fit(module, data, tmp_path / "a", 9, callbacks=[checkpoint(3, str(tmp_path / "a")), KillAt(5)])
    rest, found, data = build_module(pipeline_folder, rule(), scoring=scoring), Record(), build_data(corpus)
    callbacks = [found, checkpoint(3, str(tmp_path / "a"))]
    fit(rest, data, tmp_path / "b", 9, callbacks=callbacks, ckpt_path=str(tmp_path / "a" / "last.ckpt"))
    for a, b in zip(found.observed, expected.observed[5:], strict=True):
        assert torch.equal(a.score, b.score) and torch.equal(a.scored, b.scored) and torch.equal(a.known, b.known)
    assert all(torch.equal(a, b) for a, b in zip(found.kept, expected.kept[5:], strict=True))
    assert torch.equal(weights(rest), weights(whole))
    for name, tensor in rest.memory.state_dict().items():
        torch.testing.assert_close(tensor, whole.memory.state_dict()[name], atol=0, rtol=0, equal_nan=True)


def train_a_rank(pipeline: str, corpus: str, out: str) -> None:
    module = build_module(pipeline, FixedThreshold(1.0), scoring=Scoring(every_visits=2))
    trainer = fit(module, build_data(corpus, 2), out, 6, accumulate=2, ranks=2)
    found = dict(weights=weights(module), memory=module.memory.state_dict())
    torch.save(found, f"{out}/{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_ranks_remember_what_one_does(forks, pipeline_folder, corpus, tmp_path):
    forks.call(train_a_rank, pipeline_folder, corpus, tmp_path, log=tmp_path / "log", ranks=2)
    one, record = run(pipeline_folder, corpus, tmp_path, 6, Scoring(every_visits=2), FixedThreshold(1.0), batch_size=8)
    assert not torch.cat(record.kept).all()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, tensor in one.memory.state_dict().items():
        torch.testing.assert_close(ranks[0]["memory"][name], ranks[1]["memory"][name], atol=0, rtol=0, equal_nan=True)
        torch.testing.assert_close(ranks[0]["memory"][name], tensor, atol=1e-4, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(ranks[0]["weights"], weights(one), atol=1e-6, rtol=0)
