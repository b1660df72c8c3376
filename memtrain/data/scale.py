"""How `shards check` and `shards duplicates` grow with a corpus: time and memory over made-up rows.

The rows are those of partial results, as of shards that were read, hashes made up: what follows is the real thing,
joins, search and table. Reading and decoding pictures is not in it: that is linear, and `bench data` measures it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from memtrain.data.check import KINDS, TRUSTED
from memtrain.data.check import ROWS as CHECKED
from memtrain.data.check_report import report_check
from memtrain.data.covering import MIRRORED, WORDS, covering, effort
from memtrain.data.distribute import Local
from memtrain.data.duplicate_groups import find_equal, write_groups
from memtrain.data.duplicates import ROWS as HASHED
from memtrain.data.near_search import search, searches
from memtrain.data.partials import Manifest, open_manifest, write_partial
from memtrain.data.sources import LocalShard

DISTANCE = 31
SHARD = 10_000  # rows
# Of the rows of every second shard, so many are copies of rows of another shard: half of this of all rows
EXACT, NEAR = SHARD // 10, SHARD // 5
_SAMPLED = 0.05  # s between looks at the memory


@dataclass(frozen=True)
class Scale:
    """What so many rows took: seconds of processors, all of them together, and of the clock; peak memory.

    `searched`: of `searches` parts of the search so many were done; where not all, its seconds are scaled, and no
    groups are counted.
    """

    rows: int
    memory: int  # what was allowed, bytes
    cpu_seconds: dict[str, float]
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    searched: int
    searches: int
    planted: int
    found: int | None
    disk_bytes: int  # of partial results, hashes and pairs, before the table


def measure_scale(rows: int, folder: Path, memory: int, base: int, at_most: int | None = None) -> Scale:
    """Make partial results of so many rows, then check them and group their duplicates, in one process.

    Args:
        rows: a multiple of 20,000.
        folder: an empty folder.
        memory: bytes that all may take; `base` of these are for the interpreter and libraries.
        at_most: do so many parts of the search alone.
    """
    if rows < 2 * SHARD or rows % (2 * SHARD):
        raise ValueError(f"--rows must be multiples of {2 * SHARD}, got {rows}")
    shards = [LocalShard(folder / f"{n:06d}.tar", f"{n:06d}.tar") for n in range(rows // SHARD)]
    room = memory - base
    measured = _Measured()
    manifest = open_manifest(folder / "check", "check", TRUSTED, shards)
    for number in range(len(shards)):
        _write_checked(manifest, number)
    with measured("check"):
        report = report_check(manifest, manifest.folder, room, 1)
    assert sum(shard.faults["duplicate_across"] for shard in report.shards) == EXACT * (len(shards) // 2)
    shutil.rmtree(manifest.folder)
    manifest = open_manifest(folder / "duplicates", "duplicates", "", shards)
    for number in range(len(shards)):
        _write_hashed(manifest, number)
    with measured("equal"):
        work = find_equal(manifest, DISTANCE, room, 1)
    tasks = len(searches(work, DISTANCE))
    done = tasks if at_most is None else min(at_most, tasks)
    with measured("search", scaled=tasks / done):
        search(work, DISTANCE, room, Local(1), lambda items, total: items, done)
    found = None
    disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    with measured("groups"):
        groups = write_groups(manifest, work, folder / "groups.parquet", room, 1)
    if done == tasks:
        found = groups.num_groups
    shutil.rmtree(manifest.folder)
    planted = (EXACT + NEAR) * (len(shards) // 2)
    return Scale(
        rows, memory, measured.cpu_seconds, measured.seconds, measured.peaks, done, tasks, planted, found, disk
    )


def extrapolated(measured: list[Scale], rows: int) -> dict[str, float]:
    """Seconds of one core that so many rows would take, of check and of duplicates.

    Joins grow with the rows. The search takes `row` seconds for each row and pass, and `pair` for each pair of hashes
    that meets (`data.covering.effort`): both are fitted to what was measured, by least squares of the relative error.
    """
    largest = max(measured, key=lambda scale: scale.rows)
    linear = rows / largest.rows
    efforts = np.array([effort(covering(DISTANCE, scale.rows), scale.rows) for scale in measured])
    seconds = np.array([scale.cpu_seconds["search"] for scale in measured])
    fitted = _fitted(efforts / seconds[:, None])
    search_seconds = float(np.array(effort(covering(DISTANCE, rows), rows)) @ fitted)
    joined = largest.cpu_seconds["equal"] + largest.cpu_seconds["groups"]
    return {"check": largest.cpu_seconds["check"] * linear, "duplicates": joined * linear + search_seconds}


def _fitted(efforts: np.ndarray) -> np.ndarray:
    """Two numbers, none below 0, by which these efforts come nearest to 1. (M, 2) -> (2,)"""
    both = np.linalg.lstsq(efforts, np.ones(len(efforts)), rcond=None)[0]
    if (both > 0).all():
        return both
    return np.array([1 / efforts[:, 0].mean(), 0.0])  # too few rows for pairs to matter


def slope(measured: list[Scale], step: str) -> float:
    """How time grows with rows, as a power: 1 is linear. Between the smallest and the largest."""
    ordered = sorted(measured, key=lambda scale: scale.rows)
    first, last = ordered[0], ordered[-1]
    return float(np.log(last.cpu_seconds[step] / first.cpu_seconds[step]) / np.log(last.rows / first.rows))


# ---- made-up partial results


def _write_checked(manifest: Manifest, number: int) -> None:
    sha256, _ = _hashes(number, len(manifest.shards))
    keys = [b"%09d" % row for row in range(number * SHARD, (number + 1) * SHARD)]
    nothing = pa.nulls(SHARD)
    columns = {"key": keys, "sha256": _as_bytes(sha256)}
    columns |= {name: nothing.cast(CHECKED.field(name).type) for name in ("kind", "cause", "lost")}
    counts = {"samples": SHARD, "complete": SHARD, "successes": SHARD, "lost": 0} | dict.fromkeys(KINDS, 0)
    shard = manifest.shards[number]
    write_partial(manifest, shard, manifest.state(shard), pa.table(columns, CHECKED), counts)


def _write_hashed(manifest: Manifest, number: int) -> None:
    sha256, pdq = _hashes(number, len(manifest.shards))
    keys = [b"%09d" % row for row in range(number * SHARD, (number + 1) * SHARD)]
    columns = {
        "key": keys,
        "sha256": _as_bytes(sha256),
        "pdq": _as_bytes(pdq),
        "quality": np.full(SHARD, 100, np.int32),
        "caption": [f"a made-up caption, of row {row} of shard {number}" for row in range(SHARD)],
        "problem": pa.nulls(SHARD, pa.string()),
    }
    counts = {"samples": SHARD, "unreadable": 0}
    shard = manifest.shards[number]
    write_partial(manifest, shard, manifest.state(shard), pa.table(columns, HASHED), counts)


def _hashes(number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """sha256 and PDQ of a shard's rows, (SHARD, 4) uint64 each; a shard of the second half repeats one of the first."""
    sha256, pdq = _random(number)
    if number >= count // 2:
        other_sha256, other_pdq = _random(count - 1 - number)
        sha256[:EXACT], pdq[:EXACT] = other_sha256[:EXACT], other_pdq[:EXACT]
        pdq[EXACT : EXACT + NEAR] = _near(other_pdq[EXACT : EXACT + NEAR], np.random.default_rng([2, number]))
    return sha256, pdq


def _random(number: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng([1, number]).integers(0, 2**64, (2, SHARD, WORDS), dtype=np.uint64)
    return drawn[0], drawn[1]


def _near(hashes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hashes with 1 to 31 other bits, every second one mirrored. (N, 4) -> (N, 4)"""
    start, stride = (
        rng.integers(0, 256, len(hashes)),
        2 * rng.integers(0, 128, len(hashes)) + 1,
    )  # odd: none comes twice
    bits = (start[:, None] + stride[:, None] * np.arange(DISTANCE)) % 256
    chosen = np.zeros((len(hashes), 64 * WORDS), np.uint8)
    is_flipped = np.arange(DISTANCE) < rng.integers(1, DISTANCE + 1, len(hashes))[:, None]
    np.put_along_axis(chosen, bits, is_flipped.astype(np.uint8), axis=1)
    changed = hashes ^ np.packbits(chosen, axis=1, bitorder="little").view(np.uint64)
    changed[::2] = changed[::2] ^ MIRRORED
    return changed


def _as_bytes(words: np.ndarray) -> pa.Array:
    """(N, 4) uint64 as N values of 32 bytes."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(words), [None, pa.py_buffer(words.tobytes())])


# ---- time and memory


class _Measured:
    """Seconds and peak memory of blocks, by their names."""

    def __init__(self) -> None:
        self.cpu_seconds: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def __call__(self, name: str, scaled: float = 1.0) -> Iterator[None]:
        stop, peak = threading.Event(), [0]

        def watch() -> None:
            while True:
                peak[0] = max(peak[0], _resident_bytes())
                if stop.wait(_SAMPLED):
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        cpu, clock = time.process_time(), time.perf_counter()
        yield
        self.cpu_seconds[name] = (time.process_time() - cpu) * scaled
        self.seconds[name] = (time.perf_counter() - clock) * scaled
        stop.set()
        watcher.join()
        self.peaks[name] = peak[0]


def _resident_bytes() -> int:
    """Memory that this process holds, as Linux counts it, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
