"""One definition of a copy, whoever asks."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from memtrain.cli.main import config_folder
from memtrain.core.copies import DEFAULT_MAX_RMSE, checked_max_rmse, copy_rate, is_copy, latent_rmse


def test_the_distance_is_the_norm_over_the_root_of_the_number():
    one, other = torch.randn(2, 5, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    rmse = latent_rmse(one, other)
    torch.testing.assert_close(rmse, (one - other).flatten(1).norm(dim=1) / math.sqrt(4 * 3 * 2))
    assert torch.equal(rmse, latent_rmse(other, one)) and not latent_rmse(one, one).any()
    torch.testing.assert_close(latent_rmse(one, one + 0.25), torch.full((5,), 0.25))


def test_a_copy_lies_within_the_bound_the_bound_included():
    rmse = torch.tensor([0.1, 0.25, 0.26, math.nan])
    assert is_copy(rmse).tolist() == [True, True, False, False] and is_copy(0.3, 0.5)
    assert copy_rate(rmse) == 0.5 and copy_rate(rmse, 0.1) == 0.25 and math.isnan(copy_rate(rmse[:0]))


@pytest.mark.parametrize("wrong", [0, -1, math.nan])
def test_a_bound_that_nothing_meets_is_named(wrong):
    with pytest.raises(ValueError, match=r"callbacks\.copies\.max_rmse must be > 0, got .*0\.25 is usual"):
        checked_max_rmse(wrong, "callbacks.copies.max_rmse")


def test_every_config_says_the_same():
    said = [OmegaConf.load(config_folder() / f"{name}.yaml") for name in ("evaluate", "mitigate", "callbacks/default")]
    evaluate, mitigate, callbacks = said
    bounds = [evaluate.max_rmse, mitigate.max_rmse, callbacks.copies.max_rmse, callbacks.memorized_table.max_rmse]
    assert bounds == [DEFAULT_MAX_RMSE] * 4
