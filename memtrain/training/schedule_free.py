"""Schedule-free AdamW in a run that evaluates its average on the way and goes on as if it had not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from schedulefree import AdamWScheduleFree


class ScheduleFreeAdamW(AdamWScheduleFree):
    """Trains the weights y, at which gradients are taken; its average x, by which it is judged, is had for a while.

    Checkpoints hold y, so that a resumed run goes on bit for bit: x and back again would be rounded twice.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.train()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step; none, and nothing is counted, where no weight has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(parameter.grad is not None for group in self.param_groups for parameter in group["params"]):
            super().step()
        return loss

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put x in the place of y while the context lasts."""
        weights = [parameter for group in self.param_groups for parameter in group["params"]]
        trained = [parameter.detach().clone() for parameter in weights]
        self.eval()
        try:
            yield
        finally:
            self.train()
            with torch.no_grad():
                torch._foreach_copy_(weights, trained)  # not what `train` makes of x: it is rounded
