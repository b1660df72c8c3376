import math

import pytest
import torch

from memtrain.core.quantiles import RunningQuantiles


def sketch(half_life: float = math.inf, num_bins: int = 2) -> RunningQuantiles:
    return RunningQuantiles(num_bins, low=-12.0, high=12.0, width=0.01, half_life=half_life)


def values(kind: str, n: int = 3000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    return {
        "normal": x,
        "two far peaks": torch.where(x > 0, 8.0, -8.0) + 1e-3 * x,
        "heavy tail": (x.sign() * x.abs() ** 4).clamp(-11, 11),
        "constant": torch.full((n,), 0.123, dtype=torch.float64),
        "rising": torch.linspace(-10, 10, n, dtype=torch.float64),
        "one far outlier": torch.cat([x[1:] * 1e-3, torch.tensor([11.0])]),
    }[kind]


KINDS = ("normal", "two far peaks", "heavy tail", "constant", "rising", "one far outlier")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99])
def test_a_quantile_is_at_most_a_bucket_above_the_exact_one(kind, share):
    x, running = values(kind), sketch()
    running.update(x, torch.zeros(len(x), dtype=torch.long))
    exact = x.sort().values[math.ceil(share * (len(x) + 1)) - 1]
    found = running.quantile(share)[0]
    assert exact < found + 1e-9 and found <= exact + running.width + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_pooled(kind):
    """However the values are dealt out, by time or by size, and however unequally."""
    x = values(kind)
    bins = torch.arange(len(x)) % 2
    pooled, merged = sketch(), sketch()
    pooled.update(x, bins)
    for part in (x.sort().indices[:10], x.sort().indices[10:2000], x.sort().indices[2000:]):
        other = sketch()
        other.update(x[part], bins[part])
        merged.add(other.counts)
    assert torch.equal(merged.counts, pooled.counts)
    assert torch.equal(merged.quantile(0.99), pooled.quantile(0.99))


def test_ranks_add_up_the_histograms_of_one_step():
    """Forgetting counts the observations of all ranks: parts are added before anything is forgotten."""
    x, bins = values("normal", 64), torch.arange(64) % 2
    one, two = sketch(half_life=50), sketch(half_life=50)
    for step in range(4):
        rows = slice(16 * step, 16 * step + 16)
        one.update(x[rows], bins[rows])
        two.add(sum(two.histogram(x[rows][rank::2], bins[rows][rank::2]) for rank in range(2)))
    assert torch.equal(one.counts, two.counts)


def test_its_size_does_not_grow():
    running = sketch()
    before = running.counts.shape
    for _ in range(5):
        running.update(values("heavy tail"), torch.zeros(3000, dtype=torch.long))
    assert running.counts.shape == before


def test_values_outside_the_range_count_at_the_border():
    running = sketch()
    running.update(torch.tensor([-100.0, 100.0, 0.0] * 100), torch.zeros(300, dtype=torch.long))
    assert running.quantile(0.1)[0] == pytest.approx(-12.0 + 0.01)
    assert running.quantile(0.9)[0] == pytest.approx(12.0)
    assert running.count.tolist() == [300, 0]


def test_older_observations_count_half_after_a_half_life():
    running = sketch(half_life=100)
    running.update(torch.full((100,), -5.0), torch.zeros(100, dtype=torch.long))
    weight = running.count[0].item()
    running.update(torch.full((100,), 5.0), torch.zeros(100, dtype=torch.long))
    assert running.count[0].item() == pytest.approx(weight / 2 + 100)
    for _ in range(20):
        running.update(torch.full((100,), 5.0), torch.zeros(100, dtype=torch.long))
    assert running.quantile(0.01)[0] > 4  # the model has moved on


def test_too_few_observations_have_no_tail():
    running = sketch()
    running.update(torch.zeros(98), torch.zeros(98, dtype=torch.long))
    assert running.quantile(0.99)[0] == math.inf
    running.update(torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert running.quantile(0.99)[0] < 0.02 and running.quantile(0.99)[1] == math.inf
