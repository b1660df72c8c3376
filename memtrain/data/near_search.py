"""The passes of a search for near duplicates as tasks, which any worker does: each writes the pairs that it finds.

Imports little, since a worker has its memory for hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.core.files import written_aside
from memtrain.data.distribute import Distributor
from memtrain.data.near_pairs import OnDisk, count_passes, near_pairs
from memtrain.data.partials import full_disk_named

# In a work folder: distinct hashes, and a folder of pairs of their rows
DISTINCT, NEAR = "distinct.u64", "near"
_ROWS_A_TASK = 1 << 30  # rows times passes: some seconds
_PAIRS = pa.schema([("a", pa.int64()), ("b", pa.int64())])

Progress = Callable[[Iterable, int], Iterable]  # wraps an iterable and its length


def search(
    work: Path, distance: int, memory: int, searchers: Distributor, progress: Progress, at_most: int | None = None
) -> None:
    """Find all near pairs of distinct hashes; passes that were made before are not made again.

    Args:
        memory: bytes that each searcher may take.
        at_most: do so many tasks alone.
    """
    todo = [task for task in searches(work, distance)[:at_most] if not _found_by(work, task).exists()]
    if not todo:
        return
    run = searchers.run(partial(_search_passes, work, distance, memory), todo, name=_passes_said)
    for done in progress(run, len(todo)):
        if done.failure:
            raise OSError(f"{_passes_said(todo[done.index])} failed: {done.failure}; the same command goes on there")


def searches(work: Path, distance: int) -> list[tuple[int, int]]:
    """The tasks of a search, each some passes over the distinct hashes of a work folder."""
    count = len(OnDisk(work / DISTINCT))
    passes = count_passes(distance, count) if count > 1 else 0
    step = max(1, _ROWS_A_TASK // max(1, count))
    return [(begin, min(begin + step, passes)) for begin in range(0, passes, step)]


def _found_by(work: Path, task: tuple[int, int]) -> Path:
    return work / NEAR / f"{task[0]:05d}-{task[1]:05d}.parquet"


def _passes_said(task: tuple[int, int]) -> str:
    return f"the search for near duplicates, passes {task[0]} to {task[1] - 1},"


def _search_passes(work: Path, distance: int, memory: int, task: tuple[int, int]) -> int:
    """Write the pairs that some passes find; returns how many."""
    target, count = _found_by(work, task), 0
    found = near_pairs(OnDisk(work / DISTINCT), distance, memory, range(*task))
    with (
        written_aside(target, shared=True) as aside,
        full_disk_named(target),
        pq.ParquetWriter(aside, _PAIRS, compression="zstd") as writer,
    ):
        for left, right in found:
            writer.write_table(pa.table([left, right], schema=_PAIRS))
            count += len(left)
    return count
