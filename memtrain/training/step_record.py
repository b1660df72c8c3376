"""What an optimizer step leaves behind for those who look on."""

from __future__ import annotations

from dataclasses import dataclass

from memtrain.core.exclusion import Decision, Observations


@dataclass(frozen=True)
class DecidedRows:
    """Rows of one rank, what they showed, and what the exclusion rule decided about each."""

    observed: Observations  # N rows, each field (N,): who they are, timestep, loss and score
    decision: Decision  # of the same N rows: keep_mask (N,) bool, and the threshold (N,) each was held against


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step as this rank saw it, complete when the step is over: all its micro-batches together."""

    step: int  # optimizer steps before this one, from 0; what the draws and the ledger's rows of this step name
    trained: DecidedRows  # N = rows of a micro-batch x micro-batches, one micro-batch after the other
    reference: DecidedRows | None  # N = reference rows of a rank's turn, never trained on; None: nobody's turn

    @property
    def groups(self) -> tuple[DecidedRows, ...]:
        """What was trained on, and, where some were seen, the reference rows."""
        return (self.trained,) if self.reference is None else (self.trained, self.reference)
