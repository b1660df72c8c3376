"""Ranks × accumulation make the step of one process, whoever is excluded; that costs one small all-reduce."""

from collections import Counter

import pytest
import torch

from tests.support.worlds import GLOBAL_BATCH, train_all

STEPS = 6
COUNTED = range(1, 3)  # steps; the profiler is slow
CUTS = [(1, 4), (2, 2), (4, 1)]  # ranks, micro-batches

pytestmark = pytest.mark.slow


def job(rule: str, accumulate: int, steps: int = STEPS, *, name: str, **more) -> dict:
    options = dict(count=None, sharded=False, resume=None) | more
    return dict(name=name, rule=rule, accumulate=accumulate, steps=steps) | options


@pytest.fixture(scope="module")
def found(forks, pipeline_folder, corpus, tmp_path_factory):
    """What each rank of each job ended with: found("few-4x1", rank)."""
    out = tmp_path_factory.mktemp("worlds")
    worlds = {1: [job("few", 1, name="few-1x1")], 2: [], 4: []}
    for ranks, accumulate in CUTS:
        worlds[ranks] += [job("few", accumulate, name=f"few-{ranks}x{accumulate}")]
    last = str(out / "sharded" / "last.ckpt")
    worlds[2] += [
        job("few", 1, 3, sharded=True, name="sharded"),
        job("few", 1, sharded=True, resume=last, name="resumed"),
    ]
    rules = ("none", "fixed", "evidence", "plain")  # plain is last: it changes the process
    worlds[2] += [job(rule, 1, COUNTED.stop, count=list(COUNTED), name=f"counted-{rule}") for rule in rules]
    for ranks, jobs in worlds.items():
        forks.call(train_all, pipeline_folder, corpus, out, jobs, ranks, log=out / f"log-{ranks}", ranks=ranks)
    return lambda name, rank=0: torch.load(out / f"{name}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize(("ranks", "accumulate"), CUTS)
def test_every_cut_of_the_global_batch_trains_the_same_weights(found, ranks, accumulate):
    """6 steps of 8 rows, one in eleven kept: ranks are left with nothing, steps with nothing at all."""
    one, cut = found("few-1x1"), found(f"few-{ranks}x{accumulate}")
    assert 0 < one["skipped"] == cut["skipped"] < STEPS and cut["seen"] == one["seen"] == STEPS * GLOBAL_BATCH
    torch.testing.assert_close(cut["weights"], one["weights"], atol=1e-6, rtol=0)
    torch.testing.assert_close(cut["average"], one["average"], atol=1e-6, rtol=0)
    assert (one["weights"] - one["before"]).abs().max() > 1e-3  # a thousand times the tolerance
    anchored = sum(found(f"few-{ranks}x{accumulate}", rank)["anchored"] for rank in range(ranks))
    torch.testing.assert_close(anchored, one["anchored"], atol=0, rtol=1e-4)
    assert one["anchored"] > 1


@pytest.mark.parametrize(("ranks", "accumulate"), [cut for cut in CUTS if cut[0] > 1])
def test_ranks_end_alike_though_some_were_left_with_nothing(found, ranks, accumulate):
    of_ranks = [found(f"few-{ranks}x{accumulate}", rank) for rank in range(ranks)]
    assert sum(rank["alone_with_nothing"] for rank in of_ranks) > 1
    for rank in of_ranks[1:]:
        assert torch.equal(rank["weights"], of_ranks[0]["weights"])
        assert rank["skipped"] == of_ranks[0]["skipped"] and rank["seen"] == of_ranks[0]["seen"]


@pytest.mark.parametrize("name", ["few-1x1", *(f"few-{ranks}x{accumulate}" for ranks, accumulate in CUTS), "resumed"])
def test_nothing_kept_anywhere_changes_nothing_on_any_rank(found, name):
    """Nor does what the optimizer remembers of the steps before: bit for bit."""
    ranks = 2 if name == "resumed" else int(name[len("few-")])
    of_ranks = [found(name, rank) for rank in range(ranks)]
    assert all(rank["skipped"] > 0 and not rank["moved_by_nothing"] for rank in of_ranks)


def test_sharded_training_resumed_trains_the_same_weights(found):
    """`trainer=fsdp`: 3 steps, a checkpoint, 3 more in another trainer; validation, pictures, export between."""
    one = found("few-1x1")
    for rank in range(2):
        sharded = found("resumed", rank)
        torch.testing.assert_close(sharded["weights"], one["weights"], atol=1e-6, rtol=0)
        torch.testing.assert_close(sharded["average"], one["average"], atol=1e-6, rtol=0)
        assert sharded["skipped"] == one["skipped"] and sharded["seen"] == one["seen"]
        assert sharded["held"] < 0.6 * one["held"]
    anchored = sum(found("resumed", rank)["anchored"] for rank in range(2))  # a copy of the base on each rank
    torch.testing.assert_close(anchored, one["anchored"], atol=0, rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("rule", ["none", "fixed", "evidence"])
def test_exclusion_adds_one_all_reduce_of_a_few_scalars(found, rule, rank):
    """Against ordinary DDP. A rule that learns gathers observations, the step's and the reference set's."""
    counted = found(f"counted-{rule}", rank)
    more = Counter(counted["asked"])
    more.subtract(found("counted-plain", rank)["asked"])
    gathers = len(COUNTED) + sum(step % 2 == 0 for step in COUNTED) if rule == "evidence" else 0
    expected = {"gloo:all_reduce": len(COUNTED)}
    if gathers:  # what it keeps of every sample is shared by the ranks of the machine: all have read it, it is written
        expected |= {"gloo:all_gather": gathers, "gloo:barrier": 2 * len(COUNTED)}
    assert {name: number for name, number in more.items() if number} == expected
    assert counted["sizes"] and max(counted["sizes"]) <= 10
