"""Time spent in a part of the step, without waiting for the device inside it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class Stopwatch:
    """Sums the seconds of the blocks that it ran around; on a GPU by events, read when they are asked for.

    A block within another that it runs around counts once.
    """

    def __init__(self) -> None:
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0
        self._runs = False

    @contextlib.contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count the time of the block; work on a GPU counts as long as it takes there."""
        if self._runs:
            yield
            return
        self._runs = True
        try:
            with self._once(device):
                yield
        finally:
            self._runs = False

    @contextlib.contextmanager
    def _once(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            at = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - at
            return
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        yield
        ended.record()
        self._events.append((began, ended))
        while self._events and self._events[0][1].query():  # over: no waiting, and nothing piles up where nobody asks
            self._add(*self._events.popleft())

    def _add(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        self._seconds += began.elapsed_time(ended) / 1e3

    def take(self) -> float:
        """The seconds that were counted since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
        while self._events:
            self._add(*self._events.popleft())
        seconds, self._seconds = self._seconds, 0.0
        return seconds
