"""One definition of a copy, whoever asks."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from memtrain.cli.main import config_folder
from memtrain.core.copies import (
    DEFAULT_FALSE_COPIES,
    DEFAULT_MAX_RMSE,
    checked_false_copies,
    checked_max_rmse,
    copy_cut,
    copy_rate,
    is_copy,
    latent_rmse,
    nearest,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_distance_is_the_norm_over_the_root_of_the_number():
    one, other = torch.randn(2, 5, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    rmse = latent_rmse(one, other)
    torch.testing.assert_close(rmse, (one - other).flatten(1).norm(dim=1) / math.sqrt(4 * 3 * 2))
    assert torch.equal(rmse, latent_rmse(other, one)) and not latent_rmse(one, one).any()
    torch.testing.assert_close(latent_rmse(one, one + 0.25), torch.full((5,), 0.25))


def test_a_copy_lies_within_the_cut_the_cut_included():
    rmse = torch.tensor([0.1, 0.25, 0.26, math.nan])
    assert is_copy(rmse, 0.25).tolist() == [True, True, False, False] and is_copy(0.3, 0.5)
    assert copy_rate(rmse, 0.25) == 0.5 and copy_rate(rmse, 0.1) == 0.25 and math.isnan(copy_rate(rmse[:0], 1))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.034, 0.2])
@pytest.mark.parametrize("count", [1, 7, 99, 100, 101, 250])
def test_the_cut_is_the_largest_distance_at_which_so_few_count(share, count):
    """Against all distances that could be it, ties among them."""
    chance = random(count, seed=count).mul(40).round() / 40
    cut = copy_cut(chance, 0.5, share).distance
    assert (chance <= cut).sum() <= share * count + 1e-9 and cut <= 0.5
    assert (chance.double() <= cut).sum() == (chance <= cut).sum()  # in whatever precision
    larger = [value for value in [*chance.tolist(), 0.5] if cut < value <= 0.5]
    assert all((chance <= value).sum() > share * count for value in larger)


def test_of_few_generations_none_may_count_and_without_any_the_bound_decides():
    few = copy_cut(torch.tensor([0.3, 0.2, 0.2, 0.4]))
    assert (
        0.199999 < few.distance < 0.2 + 1e-8
        and copy_rate(torch.tensor([0.2]), few.distance) == 0
        and "none of 4 generations" in few.why
    )
    far = copy_cut(torch.full((300,), 0.8))
    assert far.distance == DEFAULT_MAX_RMSE and far.why.startswith("the bound; at most 1 % of 300")
    alone = copy_cut(torch.zeros(0), 0.4)
    assert alone.distance == 0.4 and alone.why.startswith("the bound alone")
    assert copy_cut(torch.tensor([math.nan] * 200 + [0.3] * 100)).distance < 0.3


@pytest.mark.parametrize("wrong", [0, -1, math.nan])
def test_a_bound_that_nothing_meets_is_named(wrong):
    with pytest.raises(ValueError, match=r"callbacks\.copies\.max_rmse must be > 0, got .*0\.5 is usual"):
        checked_max_rmse(wrong, "callbacks.copies.max_rmse")
    with pytest.raises(ValueError, match=r"false_copies is a share in \[0, 1\), got .*0\.01 is usual"):
        checked_false_copies(wrong - 1)


def test_the_nearest_of_all_pictures_is_found_block_by_block():
    """Against a plain loop, over more generations than are looked at in one go."""
    generations, pictures = random(300, 2, 3, 2), random(41, 2, 3, 2, seed=1)
    pictures[40] = pictures[7]  # a tie
    generations[5] = pictures[7]
    distance, which = nearest(generations, [pictures[:30], pictures[:0], pictures[30:]])
    for n in (0, 5, 130, 299):
        slow = torch.stack([latent_rmse(generations[n][None], picture[None])[0] for picture in pictures])
        assert which[n] == slow.argmin() and distance[n].item() == pytest.approx(slow.min().item(), abs=1e-6)
    assert which[5] == 7 and distance[5] < 1e-7
    distance, which = nearest(generations, [])
    assert distance.isinf().all() and (which == -1).all()


def test_every_config_says_the_same():
    said = [OmegaConf.load(config_folder() / f"{name}.yaml") for name in ("evaluate", "mitigate", "callbacks/default")]
    evaluate, mitigate, callbacks = said
    bounds = [evaluate.max_rmse, mitigate.max_rmse, callbacks.copies.max_rmse, callbacks.memorized_table.max_rmse]
    assert bounds == [DEFAULT_MAX_RMSE] * 4
    shares = [evaluate.false_copies, mitigate.false_copies, callbacks.copies.false_copies]
    assert shares == [DEFAULT_FALSE_COPIES] * 3
