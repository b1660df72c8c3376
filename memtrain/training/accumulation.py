"""One optimizer step out of micro-batches and ranks: what the gradient is divided by, and when there is no update."""

from __future__ import annotations

import logging

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from memtrain.core.exclusion import Decision, Observations
from memtrain.data.batches import Samples
from memtrain.data.datamodule import DataModule, data_of
from memtrain.training import ranks, strategy
from memtrain.training.stops import Stops, are_finite, only_finite

log = logging.getLogger(__name__)

_SCALE_FLOOR = 1.0  # a gradient that overflows at this scale does so of itself: no smaller one mends it


class Accumulation:
    """Gathers the rows of a step's micro-batches on this rank, settles its gradient with the others, and counts.

    Args:
        denominator: divide the summed gradient by the `kept` samples of the optimizer step, or by `all`.
        stops: told of steps that are not finite.
    """

    def __init__(self, denominator: str, stops: Stops):
        self.denominator, self.stops = denominator, stops
        self.samples_seen = 0  # by all ranks, as are the other counts
        self.samples_bad = 0  # samples that could not be decoded
        self.updates_skipped = 0  # updates that were not made because every sample was excluded
        self.scaler_backoffs = 0  # updates skipped because the scaled fp16 gradient overflowed
        self.step_is_bad = False  # the newest step: a loss or gradient was not finite
        self.is_skipped = False  # the newest step made no update
        self.mid_step = False  # weights, average and rule are not yet all those of one step
        self._begin()

    def _begin(self) -> None:
        self._observed: list[Observations] = []
        self._decisions: list[Decision] = []
        self._valid: list[Tensor] = []

    def add(self, observed: Observations, decision: Decision, valid: Tensor) -> None:
        """Take in what B rows of one micro-batch showed. `valid` (B,) bool: the sample could be decoded."""
        self._observed.append(observed)
        self._decisions.append(decision)
        self._valid.append(valid)

    def settle(self, trainer: pl.Trainer, parameters: list[nn.Parameter]) -> None:
        """Divide the summed gradient by the samples of the whole optimizer step (docs/method.md).

        Lightning has divided each micro-batch's sum by the number of micro-batches and DDP by the number of
        ranks; both are undone here. Where no sample anywhere is kept, or a number is not finite, all ranks drop it.
        An fp16 gradient that overflows while all losses are finite is nobody's fault: the scaler tries how large a
        scale it can have, and backs off.
        """
        data = data_of(trainer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        parts = zip(self._observed, self._valid, strict=True)
        # rows of this rank, of all micro-batches, whose numbers are not finite: (N,) bool
        suspect = torch.cat([valid & ~observed.finite for observed, valid in parts])
        reported = self.stops.report(suspect.any(), ~are_finite([strategy.own_part(g) for g in gradients]))
        # one sum over the ranks tells all there is: samples kept, samples decoded, and what each has to report
        keep_masks = torch.cat([decision.keep_mask for decision in self._decisions])
        counts = torch.stack([keep_masks.sum(), torch.cat(self._valid).sum()]).float()  # () each -> (2,)
        sums = ranks.all_reduce(trainer, torch.cat([counts, reported])).tolist()
        kept, rows, bad_losses, bad_gradients, missing, *signals = sums
        self.stops.break_off(trainer, missing)
        self._count(data, round(rows))
        self.stops.agree(signals)
        backs_off = bad_gradients > 0 and not bad_losses and _gradient_scale(trainer) > _SCALE_FLOOR
        self.step_is_bad = bad_losses + bad_gradients > 0 and not backs_off
        if self.step_is_bad:
            self.stops.count_bad(trainer.global_step, self._blamed(suspect, data.samples, bool(bad_losses)))
        elif not backs_off:
            self.stops.bad_in_a_row = 0
        self.is_skipped = kept == 0 or self.step_is_bad or backs_off
        if self.is_skipped:
            for parameter in parameters:
                parameter.grad = None  # optimizers pass over it: no momentum step, no weight decay
            self._count_skipped(trainer.global_step, backs_off)
            return
        factor = trainer.accumulate_grad_batches * trainer.world_size
        torch._foreach_mul_(gradients, factor / (kept if self.denominator == "kept" else rows))

    def _count(self, data: DataModule, rows: int) -> None:
        """Count the samples of a step, of which `rows` could be decoded; too many that could not end the run."""
        seen = self.samples_seen + rows
        bad = self.samples_bad + data.global_batch_size - rows
        data.check_bad(bad, bad + seen)
        self.mid_step, self.samples_seen, self.samples_bad = True, seen, bad

    def _blamed(self, suspect: Tensor, samples: Samples, told_by_losses: bool) -> list[str]:
        """Keys of this rank's samples that are marked in `suspect` (N,) bool; of all, where a gradient alone is bad.

        Args:
            told_by_losses: the losses of some rank tell whose rows they are, those of others or its own.
        """
        index = torch.cat([observed.sample_index for observed in self._observed])
        return [samples.key(position) for position in (index[suspect] if told_by_losses else index).tolist()]

    def _count_skipped(self, step: int, backs_off: bool) -> None:
        """Count a step without an update by its cause, and say so at the first one of each."""
        if self.step_is_bad:
            return  # `stops` counts these
        if backs_off:
            self.scaler_backoffs += 1
            if self.scaler_backoffs == 1:
                log.info("step %d: the fp16 gradient overflowed, so its scale is halved and there is no update "
                         "(this is counted; said once)", step)  # fmt: skip
            return
        self.updates_skipped += 1
        if self.updates_skipped == 1:
            log.warning("step %d: every sample was excluded, so there is no update (this is counted; said once)", step)

    def take(self) -> tuple[Observations, Decision]:
        """Hand over the step's N rows on this rank, one micro-batch after the other, and begin the next step."""
        observed, decision = Observations.concatenate(self._observed), Decision.concatenate(self._decisions)
        self._begin()
        return only_finite(observed) if self.step_is_bad else observed, decision

    def state_dict(self) -> dict[str, int]:
        return {
            "updates_skipped": self.updates_skipped,
            "scaler_backoffs": self.scaler_backoffs,
            "samples_seen": self.samples_seen,
            "samples_bad": self.samples_bad,
            "bad_steps": self.stops.bad_steps,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates_skipped, self.samples_seen = state["updates_skipped"], state["samples_seen"]
        self.samples_bad, self.stops.bad_steps = state["samples_bad"], state["bad_steps"]
        self.scaler_backoffs = state.get("scaler_backoffs", 0)  # not in older checkpoints


def _gradient_scale(trainer: pl.Trainer) -> float:
    """The factor of the losses before the backward pass, so that fp16 gradients do not vanish; 1: there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)  # of trainer.precision=16-mixed alone
    return 1.0 if scaler is None else scaler.get_scale()
