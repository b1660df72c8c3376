"""Rules that gather evidence over a sample's visits, and leave it out at every timestep while it is high."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from memtrain.core.exclusion import (
    EXCLUDE,
    PULL,
    REFERENCE,
    SACRIFICED,
    Decision,
    ExclusionRule,
    Observations,
    at_least,
    log_score,
    open_share,
    positive,
    reachable,
    restored,
    telling,
)
from memtrain.core.statistics import BinnedMoments, timestep_bin

HIGH, LATCHED = 1, 2  # bits of a sample's state: its evidence is against it; it stays out, whatever that says


class Evidence(ExclusionRule):
    """A rule that adds up what a sample's visits show, and excludes it while that is high; 5 bytes a sample.

    The two rules below say what a visit shows. Duplicates are one sample here: what a visit shows of one of them is
    evidence for all, whatever their keys, for it is the picture that is memorized. A sample enters exclusion when
    its evidence reaches `enter` and leaves when it falls below `leave`, unless it is latched: then it stays, and is
    pulled alone until its evidence falls below `leave`. Every scored visit changes it: `memory` times what it was,
    plus what the visit shows.

    Args:
        memory: share of the evidence that outlives a visit, in [0, 1]; 0 acts on single draws.
        num_bins: timestep bins over the whole schedule.
        half_life: reference scores of a bin after which an older one counts half.
        warmup: reference scores that a bin needs before its visits count.
        latch: a sample that has entered stays left out, as long as the run lasts.
        start_step, action: of every rule.
    """

    learns = remembers = True
    needs_reference = True
    per_sample: tuple[str, ...] = ("evidence", "state")
    floor = -math.inf  # evidence rests here, however much speaks for a sample

    def __init__(
        self,
        enter: float,
        leave: float,
        memory: float,
        num_bins: int,
        half_life: int,
        warmup: int,
        latch: bool,
        start_step: int,
        action: str,
    ):
        super().__init__(start_step, action)
        if not 0 <= memory <= 1:
            raise ValueError(f"exclusion.memory must be in [0, 1], got {memory:g}; 0 acts on single draws")
        at_least(1, num_bins=num_bins, half_life=half_life, warmup=warmup)
        reachable(warmup, half_life)
        self.enter, self.leave, self.memory = enter, leave, memory
        self.num_bins, self.warmup, self.latch = num_bins, warmup, latch
        self.reference = BinnedMoments(num_bins, half_life)

    def setup(self, num_samples: int, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self.evidence = self.zeros(num_samples)
        self.state = self.zeros(num_samples, torch.uint8)

    @property
    def excluded(self) -> Tensor:
        """Which samples have evidence against them as it is now. (num_samples,) bool"""
        return self.state & HIGH > 0

    def prior(self, copies: Tensor) -> Tensor:
        """Evidence that lies in how many samples of the corpus show the picture, alone. (B,) int64 -> (B,)"""
        return torch.zeros(len(copies))

    @abstractmethod
    def shows(self, observed: Observations) -> tuple[Tensor, Tensor]:
        """What each of B visits adds to its sample's evidence, and whether it counts. (B,), (B,) bool, on the CPU"""

    def bins(self, observed: Observations) -> Tensor:
        """The timestep bin of each visit. (B,) int64, on the CPU"""
        return timestep_bin(observed.timesteps.cpu(), self.num_timesteps, self.num_bins)

    def counts(self, observed: Observations) -> Tensor:
        """Whether each visit counts: its score says something, and its bin's reference is known. (B,) bool"""
        return telling(observed) & (self.reference.count[self.bins(observed)] >= self.warmup)

    def decide(self, observed: Observations) -> Decision:
        shown, counts = self.shows(observed)
        index = observed.picture.cpu()
        evidence = torch.where(counts, self.memory * self.evidence[index] + shown, self.evidence[index])
        state = self.state[index]
        threshold = torch.where(state & HIGH > 0, self.leave, self.enter) - self.prior(observed.copies.cpu())
        device, high = observed.score.device, evidence >= threshold
        keep_mask = ~(high | (state & LATCHED > 0))
        return Decision(keep_mask.to(device), threshold.to(device), pull_mask=high.to(device))

    def update(self, observed: Observations) -> None:
        shown, counts = self.shows(observed)
        # P pictures, (P,) each; `place` (V,) tells the picture of each of the V visits that count
        index, place = observed.picture.cpu()[counts].unique(return_inverse=True)
        visits = torch.zeros(len(index)).index_add_(0, place, torch.ones(len(place)))
        total = torch.zeros(len(index)).index_add_(0, place, shown[counts])
        # the mean of several visits in one step, as often as there were visits: their order does not matter
        gained = sum_of_powers(self.memory, visits) * total / visits
        evidence = self.memory**visits * self.evidence[index] + gained
        prior = self.prior(torch.ones_like(index).index_copy_(0, place, observed.copies.cpu()[counts]))
        state = self.state[index]
        high = evidence + prior >= torch.where(state & HIGH > 0, self.leave, self.enter)
        self.state[index] = (state & LATCHED) | high.to(torch.uint8) * (HIGH | LATCHED if self.latch else HIGH)
        self.evidence[index] = torch.maximum(evidence, self.floor - prior)
        self.learn(observed)

    @abstractmethod
    def learn(self, observed: Observations) -> None:
        """Follow what the groups score, once the evidence is updated."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"evidence": self.evidence, "state": self.state, "reference": self.reference.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if "evidence" in state and len(state["evidence"]) != len(self.evidence):
            raise ValueError(
                f"the checkpoint's exclusion rule knows {len(state['evidence'])} samples, this corpus has "
                f"{len(self.evidence)}; resume on the shards that the run was started with"
            )
        self.evidence, self.state, self.reference.sums = restored(
            state, evidence=self.evidence, state=self.state, reference=self.reference.sums
        )


def sum_of_powers(base: float, count: Tensor) -> Tensor:
    """The sum 1 + base + ... + base^(count - 1) for each count. (P,) -> (P,)"""
    return count if base == 1 else (1 - base**count) / (1 - base)


VISIT_RATIO = 4  # variance of x among a picture's visits over that of its mean among pictures; about so in the demo


class LikelihoodEvidence(Evidence):
    """`exclusion=evidence`: a sequential test (Wald 1945) of memorized against never trained.

    The statistic of a visit is x = log(d / sqrt(loss)): how far the caption moves the prediction, compared
    with what stays unexplained. Where a sample is memorized d rises at high noise and falls in the middle,
    while the loss falls at every t; x rises at every t, early, and differs less from picture to picture than
    the loss does. In each timestep bin x is taken as normal, with the reference set's mean and deviation for
    a sample that is not memorized, and a mean of its own for one that is, learnt from the sacrificed
    canaries. A visit adds the logarithm of the likelihood ratio of the two, either sign of the difference
    being used.

    Pictures differ in x for reasons of their own, and that error does not average out over visits. So of a
    visit's z-score a part of the mean of the sample's first `own_visits` is taken, the part that was there
    before it could be memorized: as much as its visits tell of the picture (shrinkage by VISIT_RATIO), and no
    more than `own_limit`, so that a sample which the model knew by heart from the start still stands out.

    Evidence enters at log((1 - miss) / fpr) and leaves below log(miss / (1 - fpr)), where it also rests, so
    that a sample which was ordinary for long does not take longer to enter. The two rates hold for one test
    on independent visits; visits of one picture are not, hence the `memory` below 1 and the clipped visits.

    A picture of which the corpus holds n samples is memorized sooner the larger n is, about in proportion to
    log n (Carlini et al. 2023, "Quantifying memorization", section 4): so `copies_weight` log n is what speaks
    for it before any visit, as the logarithm of prior odds, and no more than leaves one visit to decide.

    Until sacrificed canaries were seen, and without any, a memorized sample's mean is taken to lie `shift`
    deviations above the reference set's: evidence is then a sum of z-scores.

    Args:
        false_positive_rate, miss_rate: of the test, in (0, 1), together below 1.
        clip: a visit changes the evidence by no more, so that one draw does not decide.
        shift: of a memorized sample's mean, in the reference set's deviations, before one is learnt.
        shift_weight: how many sacrificed canaries' visits to a bin it takes to outweigh `shift`.
        canary_half_life: visits of sacrificed canaries to a bin after which an older one counts half.
        own_visits: first visits of a sample that tell what is its own, in [0, 255].
        own_limit: of a sample's own part, in the reference set's deviations.
        copies_weight: of the logarithm of the number of a picture's samples in the corpus, >= 0.
        latch: a sample that has entered stays left out, as long as the run lasts.
    """

    per_sample = (*Evidence.per_sample, "own", "seen")

    def __init__(
        self,
        false_positive_rate: float,
        miss_rate: float,
        memory: float,
        clip: float,
        shift: float,
        shift_weight: float,
        num_bins: int,
        half_life: int,
        canary_half_life: int,
        own_visits: int,
        own_limit: float,
        copies_weight: float,
        latch: bool,
        warmup: int,
        start_step: int = 0,
        action: str = PULL,
    ):
        fpr = open_share("false_positive_rate", false_positive_rate, "0.05 is usual")
        miss = open_share("miss_rate", miss_rate, "0.1 is usual")
        if not fpr + miss < 1:
            raise ValueError(
                f"exclusion.false_positive_rate + exclusion.miss_rate must be < 1, got {fpr:g} + {miss:g}; "
                "a coin does as well"
            )
        enter, leave = math.log((1 - miss) / fpr), math.log(miss / (1 - fpr))
        super().__init__(enter, leave, memory, num_bins, half_life, warmup, latch, start_step, action)
        at_least(1, canary_half_life=canary_half_life)
        self.floor = leave
        self.clip, self.shift = positive("clip", clip), positive("shift", shift)
        self.shift_weight = positive("shift_weight", shift_weight)
        reachable(shift_weight, canary_half_life, needed="shift_weight", by="canary_half_life")
        if not 0 <= own_visits <= 255:
            raise ValueError(f"exclusion.own_visits must be in [0, 255], got {own_visits}; 0 compares all alike")
        self.own_visits, self.own_limit = own_visits, positive("own_limit", own_limit)
        if not copies_weight >= 0:
            raise ValueError(f"exclusion.copies_weight must be >= 0, got {copies_weight:g}; 0 makes nothing of copies")
        self.copies_weight = copies_weight
        self.memorized = BinnedMoments(num_bins, canary_half_life)

    def setup(self, num_samples: int, num_timesteps: int) -> None:
        super().setup(num_samples, num_timesteps)
        self.own = self.zeros(num_samples, torch.float16)  # mean z-score of the first visits
        self.seen = self.zeros(num_samples, torch.uint8)  # these

    def prior(self, copies: Tensor) -> Tensor:
        return (self.copies_weight * copies.float().log()).clamp(max=max(0.0, self.enter - self.clip))

    def statistic(self, observed: Observations) -> Tensor:
        """What is measured at a visit, x = log(d / sqrt(loss)). (B,) float64, on the CPU"""
        return log_score(observed.score) - log_score(observed.loss) / 2

    def expected_shift(self) -> Tensor:
        """How far a memorized sample's mean lies above the reference set's, in its deviations. (num_bins,)"""
        learnt = (self.memorized.mean - self.reference.mean) / self.reference.std
        weight = self.memorized.count / (self.memorized.count + self.shift_weight)
        return weight * learnt + (1 - weight) * self.shift

    def z_scores(self, observed: Observations) -> Tensor:
        """How far x lies above the reference set's mean, in its deviations. (B,) float64, on the CPU"""
        bins = self.bins(observed)
        return (self.statistic(observed) - self.reference.mean[bins]) / self.reference.std[bins]

    def own_part(self, index: Tensor) -> Tensor:
        """The part of a sample's z-scores that is its picture's own. (B,) int64 -> (B,) float64"""
        seen = self.seen[index].double()
        return (self.own[index] * seen / (seen + VISIT_RATIO)).clamp(-self.own_limit, self.own_limit)

    def shows(self, observed: Observations) -> tuple[Tensor, Tensor]:
        z = self.z_scores(observed) - self.own_part(observed.picture.cpu())
        shift = self.expected_shift()[self.bins(observed)]
        ratio = shift * (z - shift / 2)  # log of N(z; shift, 1) / N(z; 0, 1)
        return ratio.clamp(-self.clip, self.clip).float(), self.counts(observed)

    def learn(self, observed: Observations) -> None:
        self._learn_own(observed)
        bins, x, group = self.bins(observed), self.statistic(observed), observed.group.cpu()
        for moments, of in ((self.reference, REFERENCE), (self.memorized, SACRIFICED)):
            learned = telling(observed) & (group == of)
            moments.update(x[learned], bins[learned])

    def _learn_own(self, observed: Observations) -> None:
        """Average the z-scores of each picture's first visits."""
        index = observed.picture.cpu()
        learned = self.counts(observed) & (self.seen[index] < self.own_visits)
        index, place = index[learned].unique(return_inverse=True)  # (P,) pictures, (V,) of each visit
        z = self.z_scores(observed)[learned]
        visits = torch.zeros(len(index), dtype=torch.float64).index_add_(0, place, torch.ones_like(z))
        total = torch.zeros(len(index), dtype=torch.float64).index_add_(0, place, z)
        seen = self.seen[index].double()
        self.own[index] = ((self.own[index] * seen + total) / (seen + visits)).half()
        self.seen[index] = (seen + visits).clamp(max=self.own_visits).to(torch.uint8)

    def state_dict(self) -> dict[str, Tensor]:
        own = {"own": self.own, "seen": self.seen}
        return super().state_dict() | own | {"memorized": self.memorized.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.own, self.seen, self.memorized.sums = restored(
            state, own=self.own, seen=self.seen, memorized=self.memorized.sums
        )


class ZScoreEvidence(Evidence):
    """`exclusion=z_scores`: evidence is the moving average of a sample's z-scores at high noise.

    One draw of d says little, and only at high noise does a memorized sample stand above the others
    (docs/method.md). So each visit at t >= `min_timestep` gives a z-score, of log d, against what the
    never-trained reference set scores in the same timestep bin. No canary is needed.

    Args:
        enter, leave: bounds on the evidence, in standard deviations of the reference set; leave <= enter.
        memory: weight of the past in a sample's moving average, in [0, 1); 0 acts on single draws.
        min_timestep: visits at lower timesteps are not counted, as a share of the schedule in [0, 1).
    """

    def __init__(
        self,
        enter: float,
        leave: float,
        memory: float,
        min_timestep: float,
        num_bins: int,
        half_life: int,
        warmup: int,
        start_step: int = 0,
        action: str = EXCLUDE,
    ):
        enter = positive("enter", enter)
        super().__init__(enter, leave, memory, num_bins, half_life, warmup, False, start_step, action)
        if not leave <= enter:
            raise ValueError(f"exclusion.leave must be <= exclusion.enter ({enter:g}), got {leave:g}")
        if not memory < 1:
            raise ValueError(f"exclusion.memory must be in [0, 1), got {memory:g}; 0 acts on single draws")
        if not 0 <= min_timestep < 1:
            raise ValueError(f"exclusion.min_timestep is a share of the schedule in [0, 1), got {min_timestep:g}")
        self.min_timestep = min_timestep

    def shows(self, observed: Observations) -> tuple[Tensor, Tensor]:
        bins = self.bins(observed)
        z = (log_score(observed.score) - self.reference.mean[bins]) / self.reference.std[bins]
        high_noise = observed.timesteps.cpu() >= self.min_timestep * self.num_timesteps
        return (1 - self.memory) * z.float(), self.counts(observed) & high_noise

    def learn(self, observed: Observations) -> None:
        learned = telling(observed) & (observed.group.cpu() == REFERENCE)
        self.reference.update(log_score(observed.score)[learned], self.bins(observed)[learned])
