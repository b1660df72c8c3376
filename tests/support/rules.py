"""Rules over 100 samples, set up; rules that a tiny run warms in a few steps, with thresholds amid its scores."""

import torch

from memtrain.core.binned_rules import Calibrated, IetAgc, Quantile
from memtrain.core.evidence import LikelihoodEvidence, ZScoreEvidence
from memtrain.core.exclusion import Decision, ExclusionRule

BINS = 10


def quantile(**options) -> Quantile:
    return ready(Quantile(**(dict(quantile=0.9, num_bins=BINS, half_life=1000, warmup=20) | options)))


def calibrated(**options) -> Calibrated:
    defaults = dict(false_positive_rate=0.01, num_bins=BINS, level_half_life=250, half_life=1000, pooling=1000)
    return ready(Calibrated(**(defaults | dict(warmup=50) | options)))


def agc(**options) -> IetAgc:
    return ready(IetAgc(**(dict(ratio=1.25, num_bins=BINS, half_life=1000, warmup=2) | options)))


def ready(rule):
    rule.setup(num_samples=100, num_timesteps=1000)
    return rule


def z_scores(num_samples=100, **options) -> ZScoreEvidence:
    defaults = dict(enter=1.0, leave=0.5, memory=0.8, min_timestep=0.7, num_bins=10, half_life=1000, warmup=20)
    rule = ZScoreEvidence(**(defaults | options))
    rule.setup(num_samples=num_samples, num_timesteps=1000)
    return rule


def likelihood(num_samples=100, **options) -> LikelihoodEvidence:
    defaults = dict(false_positive_rate=0.05, miss_rate=0.1, memory=0.95, clip=3.0, shift=1.0, shift_weight=5)
    defaults |= dict(num_bins=10, half_life=1000, canary_half_life=1000, own_visits=0, own_limit=1.0)
    defaults |= dict(copies_weight=0.5, latch=False, warmup=20)
    rule = LikelihoodEvidence(**(defaults | options))
    rule.setup(num_samples=num_samples, num_timesteps=1000)
    return rule


def with_own_part(num_samples=100, **options) -> LikelihoodEvidence:
    return likelihood(num_samples, **(dict(own_visits=6) | options))


BINNED = (quantile, calibrated, agc)
EVIDENCE = (z_scores, likelihood, with_own_part)


def quick_evidence() -> ZScoreEvidence:
    return ZScoreEvidence(enter=0.3, leave=0.1, memory=0.5, min_timestep=0.0, num_bins=1, half_life=50, warmup=2)


def quick_rules() -> dict[str, ExclusionRule]:
    """Warm after a few steps, and with thresholds in the midst of the scores."""
    return {
        "quantile": Quantile(0.5, num_bins=2, half_life=50, warmup=4),
        "calibrated": Calibrated(0.4, num_bins=2, level_half_life=20, half_life=50, pooling=20, warmup=4, start_step=2),
        "iet_agc": IetAgc(1.02, num_bins=2, half_life=50, warmup=4),
        "evidence": LikelihoodEvidence(
            0.4,
            0.4,
            memory=0.95,
            clip=3.0,
            shift=1.0,
            shift_weight=5,
            num_bins=1,
            half_life=50,
            canary_half_life=50,
            own_visits=2,
            own_limit=1.0,
            copies_weight=0.5,
            latch=False,
            warmup=2,
        ),
        "z_scores": ZScoreEvidence(0.3, 0.1, memory=0.5, min_timestep=0.0, num_bins=1, half_life=50, warmup=2),
    }


class KeepNothing(ExclusionRule):
    def decide(self, observed):
        return Decision(torch.zeros_like(observed.scored), torch.zeros_like(observed.score))
