"""What ends a run before its last step: a signal, a lost shard, steps that are not finite. All ranks decide alike."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytorch_lightning as pl
import torch
from torch import Tensor

from memtrain.core.exclusion import Observations
from memtrain.core.transfer import sent
from memtrain.data.remote import ShardMissing
from memtrain.training import ranks
from memtrain.training.exit_codes import EXIT_CODES

log = logging.getLogger(__name__)

_KEYS_NAMED = 8
_LOST_RANK = re.compile(r"gloo|NCCL|Connection closed by peer|Connection reset by peer|Broken pipe", re.I)


class Stops:
    """Knows why a run may have to end early, and has all ranks decide it alike.

    Each rank reports beside the counts that all ranks sum at every step anyway, and reads the sum.

    Args:
        max_bad_steps: so many optimizer steps that are not finite, one after the other, end the run.
    """

    def __init__(self, max_bad_steps: int):
        if max_bad_steps < 1:
            raise ValueError(f"max_bad_steps must be >= 1, got {max_bad_steps}")
        self.max_bad_steps = max_bad_steps
        self.received: signal.Signals | None = None  # by this rank
        self.missing: str | None = None  # a shard that is gone for this rank, in words
        self.bad_steps = 0
        self.bad_in_a_row = 0
        self.reason: BaseException | None = None  # raised by all ranks at the same moment

    def report(self, bad_losses: Tensor, bad_gradients: Tensor) -> Tensor:
        """Tell what this rank has seen at this step, as numbers to be summed over ranks.

        (), () bool -> (3 + signals,) float32
        """
        told = [float(self.missing is not None), *(float(self.received == number) for number in EXIT_CODES)]
        bad = torch.stack([bad_losses, bad_gradients]).float()  # () each -> (2,)
        return torch.cat([bad, sent(torch.tensor(told), bad.device)])

    def break_off(self, trainer: pl.Trainer, missing: float) -> None:
        """Raises ShardMissing on all ranks where a shard is gone for any: a step with half its rows is none.

        Args:
            missing: on how many ranks.
        """
        if missing:
            said = next(filter(None, ranks.gather_texts(trainer, self.missing or "")))
            self.reason = ShardMissing(said)
            raise self.reason

    def agree(self, signals: Sequence[float]) -> None:
        """Have the run stop at this step where any rank received a signal.

        Args:
            signals: the sum over ranks of what each said of them.
        """
        agreed = [number for number, count in zip(EXIT_CODES, signals, strict=True) if count]
        if agreed:
            self.reason = SystemExit(EXIT_CODES[agreed[0]])

    def count_bad(self, step: int, keys: Sequence[str]) -> None:
        """Count a bad step: a loss or gradient was not finite on some rank, and the step is skipped on all.

        Args:
            step: this one.
            keys: the rank's own samples that may be to blame.
        """
        self.bad_steps += 1
        self.bad_in_a_row += 1
        blamed = ", ".join(keys[:_KEYS_NAMED]) + (f" and {len(keys) - _KEYS_NAMED} more" if keys[_KEYS_NAMED:] else "")
        said = f"step {step}: a loss or gradient is not finite; samples of this rank: {blamed or 'all finite'}"
        log.warning("%s; skipped, %d so far", said, self.bad_steps)
        if self.bad_in_a_row == self.max_bad_steps:
            self.reason = ValueError(
                f"{said}; {self.bad_in_a_row} such steps one after the other, max_bad_steps={self.max_bad_steps}; "
                "lower optimizer.lr, use trainer.precision=32-true, or leave the samples out with data.exclude_keys"
            )


@contextlib.contextmanager
def ended_clearly(trainer: pl.Trainer, stops: Stops) -> Iterator[None]:
    """Turn the error of a run that was broken off from outside into words that say what did."""
    try:
        yield
    except RuntimeError as error:
        if stops.received is not None:  # the decoding processes had the signal, too, and are gone
            raise SystemExit(EXIT_CODES[stops.received]) from error
        if trainer.world_size > 1 and _LOST_RANK.search(str(error)):
            raise ConnectionError(
                f"rank {trainer.global_rank} lost another rank after step {trainer.global_step}, see what that one "
                "said last; `resume=auto` goes on from the last checkpoint"
            ) from error
        raise


def are_finite(gradients: list[Tensor]) -> Tensor:
    """Whether every value of every gradient is finite. () bool on their device, without waiting for it"""
    return torch.stack(torch._foreach_norm(gradients)).isfinite().all()  # norms, () each -> (gradients,) -> ()


def only_finite(observed: Observations) -> Observations:
    """Rows as they are, but for those that are not finite: they say nothing, and enter no curve, rule or ledger."""
    finite = observed.finite
    return replace(
        observed,
        score=torch.where(finite, observed.score, 0.0),
        second_score=torch.where(finite, observed.second_score, 0.0),
        loss=torch.where(finite, observed.loss, 0.0),
        captioned=observed.captioned & finite,
        scored=observed.scored & finite,
        known=observed.known & finite,
    )
