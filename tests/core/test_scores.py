import math
import subprocess
import sys

import pytest
import torch

from memtrain.core import losses
from memtrain.core.scores import text_conditional_magnitude
from memtrain.core.statistics import BinnedMoments, auc, tpr_at_fpr


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_score_of_the_null_caption_is_zero_and_batches_are_independent():
    cond, null = normal(5, 4, 8, 8), normal(5, 4, 8, 8, seed=1)
    assert text_conditional_magnitude(null, null).eq(0).all()
    score = text_conditional_magnitude(cond, null)
    assert score.shape == (5,) and score.dtype == torch.float32
    alone = torch.cat([text_conditional_magnitude(c[None], n[None]) for c, n in zip(cond, null, strict=True)])
    torch.testing.assert_close(score, alone)


def test_score_is_taken_in_float32():
    cond = torch.full((1, 4, 64, 64), 10.0, dtype=torch.float16)
    assert text_conditional_magnitude(cond, torch.zeros_like(cond)).item() == pytest.approx(10 * 128)


def test_score_names_shapes_that_differ():
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(3, 4\)"):
        text_conditional_magnitude(torch.zeros(2, 4), torch.zeros(3, 4))


def test_masked_sum_keeps_what_is_not_finite_out_of_the_sum_but_not_out_of_shared_gradients():
    """A loss that is not finite because of its row's activations: 0 times NaN is NaN in what all rows share."""
    weight = torch.ones(1, requires_grad=True)
    row = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    total = losses.masked_sum(weight * row, torch.ones(3), torch.tensor([True, False, True]))
    total.backward()
    assert total.item() == 4 and row.grad.tolist() == [1, 0, 1]
    assert weight.grad.isnan()  # why a step with such a row is skipped (training.accumulation)


def test_masked_sum_keeps_a_graph_and_stops_what_is_not_finite():
    loss = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    total = losses.masked_sum(loss, torch.tensor([2.0, 1.0, 1.0]), torch.tensor([True, False, True]))
    total.backward()
    assert total.item() == 5 and loss.grad.tolist() == [2, 0, 1]
    nothing = losses.masked_sum(loss, torch.ones(3), torch.zeros(3, dtype=torch.bool))
    assert nothing.item() == 0 and nothing.requires_grad


def test_auc_equals_counting_pairs():
    positive, negative = normal(40).round(decimals=1), (normal(60, seed=1) - 0.5).round(decimals=1)
    above = (positive[:, None] > negative).double() + (positive[:, None] == negative).double() / 2
    assert auc(positive, negative) == pytest.approx(above.mean().item())
    assert math.isnan(auc(positive, negative[:0]))


def test_tpr_never_passes_the_allowed_fpr():
    negative = torch.arange(100.0)
    assert tpr_at_fpr(torch.tensor([98.0, 98.5, 99.5, 100.0]), negative) == 0.75  # one negative, 99, may be above
    assert tpr_at_fpr(torch.tensor([99.0, 99.5]), negative[:-1]) == 1.0
    assert tpr_at_fpr(torch.tensor([97.0, 98.0]), torch.arange(99.0)) == 0.0  # 1/99 > 1 %: none may be
    ties = torch.tensor([5.0] * 50 + [1.0] * 50)
    assert tpr_at_fpr(torch.tensor([5.0, 6.0]), ties) == 0.5  # a threshold at 5 would let half of them through


def test_binned_moments_without_forgetting_are_the_pooled_ones():
    values, bins = normal(500) * 3 + 1, torch.arange(500) % 4
    moments = BinnedMoments(5, half_life=1e12)
    for part in range(10):
        moments.update(values[part::10], bins[part::10])
    for number in range(4):
        mine = values[bins == number].double()
        assert moments.mean[number].item() == pytest.approx(mine.mean().item(), rel=1e-6)
        assert moments.std[number].item() == pytest.approx(mine.std(unbiased=False).item(), rel=1e-6)
    assert moments.count.tolist() == pytest.approx([125, 125, 125, 125, 0])


def test_binned_moments_follow_a_shift():
    moments = BinnedMoments(1, half_life=20)
    zero = torch.zeros(100, dtype=torch.int64)
    moments.update(normal(100), zero)
    for seed in range(5):
        moments.update(normal(100, seed=seed) + 10, zero)
    assert moments.mean.item() == pytest.approx(10, abs=0.5) and moments.std.item() < 2


def test_core_needs_torch_alone():
    code = (
        "import sys, memtrain.core.diffusion, memtrain.core.exclusion, memtrain.core.losses, memtrain.core.scores\n"
        "bad = {'pytorch_lightning', 'hydra', 'wandb', 'diffusers', 'transformers', 'webdataset', 'omegaconf'}\n"
        "assert not bad & set(sys.modules), bad & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
