"""Batches that become smaller where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

log = logging.getLogger(__name__)
T = TypeVar("T")


class ShrinkingBatches:
    """Work on a list in batches of rows; where memory runs out the batch is halved, it is said, and work goes on.

    accelerate's `find_executable_batch_size` would collect all garbage before every batch, a fifth of a second each,
    and would say of a single row that is too large only that no batch size works; what it knows of errors is used.
    """

    def __init__(self, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.batch_size = batch_size

    def over(self, total: int, work: Callable[[range], T]) -> Iterator[T]:
        """`work` of consecutive ranges that cover `range(total)`, in order."""
        first = 0
        while first < total:
            rows = range(first, min(first + self.batch_size, total))
            short_of_memory = False
            try:
                result = work(rows)
            except RuntimeError as error:
                if len(rows) == 1 or not should_reduce_batch_size(error):
                    raise
                short_of_memory = True  # handled below: here the traceback still holds the tensors
            if short_of_memory:
                self.batch_size = len(rows) // 2
                log.warning("out of memory with %d rows at a time; going on with %d", len(rows), self.batch_size)
                clear_device_cache(garbage_collection=True)
                continue
            yield result
            first = rows.stop
