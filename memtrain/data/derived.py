"""What is derived from shards before training, a file or two a shard in the cache folder: filters and buckets.

Ranks that start together find them, or one of them makes them while the others wait.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

from memtrain.core.files import written_aside
from memtrain.data.kept import one_at_a_time, read_array, write_array

Filtered = tuple[int, dict[str, int]]  # rows that are left, and how many each condition drops


def kept_filters(
    stems: Sequence[str], samples: Sequence[int], choose: Callable[[int], tuple[np.ndarray, dict[str, int]]]
) -> list[Filtered]:
    """How many rows of each shard a filter leaves and drops; which are left, is in STEM.npy.

    Args:
        stems: paths without .npy and .json, in one folder.
        samples: of each shard.
        choose: rows of a shard that are left, and how many each condition drops.
    """
    found: dict[int, Filtered] = {}

    def look(number: int) -> bool:
        filtered = _read_filter(stems[number], samples[number])
        if filtered is not None:
            found[number] = filtered
        return filtered is not None

    missing = [number for number in range(len(stems)) if not look(number)]
    if missing:
        with one_at_a_time(Path(stems[0]).parent, stems):
            for number in track(missing, "Filtering shards", disable=len(missing) < 20):
                if look(number):  # another rank was first
                    continue
                rows, dropped = choose(number)
                write_array(f"{stems[number]}.npy", rows.astype(np.int32))
                with written_aside(Path(f"{stems[number]}.json"), shared=True) as aside:
                    aside.write_text(json.dumps(dropped), encoding="utf-8")
                found[number] = len(rows), dropped
    return [found[number] for number in range(len(stems))]


def _read_filter(stem: str, samples: int) -> Filtered | None:
    """What is kept of a shard's filter; None where there is nothing yet, or its files are damaged."""
    try:
        dropped = json.loads(Path(f"{stem}.json").read_bytes())
        counts = list(dropped.values())
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    rows = read_array(f"{stem}.npy")
    if rows is None or rows.dtype != np.int32 or rows.ndim != 1 or not all(type(count) is int for count in counts):
        return None
    if len(rows) and not (rows[0] >= 0 and rows[-1] < samples and (np.diff(rows) > 0).all()):
        return None
    return len(rows), dropped


def kept_buckets(files: Sequence[str], counts: Sequence[int], sort: Callable[[int], np.ndarray]) -> None:
    """See to it that there is a file with each shard's buckets.

    Args:
        files: a path a shard, in one folder.
        counts: samples of each shard that the filter leaves.
        sort: the buckets of a shard's samples. (counts[number],) int16
    """
    if all(map(_are_buckets, files, counts)):
        return
    with one_at_a_time(Path(files[0]).parent, files):
        for number in track(range(len(files)), "Sorting into buckets", disable=len(files) < 20):
            if not _are_buckets(files[number], counts[number]):
                write_array(files[number], sort(number))


def _are_buckets(file: str, count: int) -> bool:
    found = read_array(file)
    return found is not None and found.dtype == np.int16 and found.shape == (count,)
