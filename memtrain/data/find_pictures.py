"""Find which samples of a corpus show the same picture.

They are told by the hashes of their images (`data.duplicates`), which are computed once for each shard, or by the
table that `memtrain shards duplicates` wrote (`data.repeats_from`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.progress import track

from memtrain.data.components import components
from memtrain.data.duplicates import read_groups
from memtrain.data.hashes import HASHES, read_hashes, shard_hashes
from memtrain.data.index import IndexFile
from memtrain.data.indexed import IndexedShards
from memtrain.data.kept import MANY, file_state, once, one_at_a_time, read_array, rows_of, write_array
from memtrain.data.pictures import NO_DUPLICATES, Pictures
from memtrain.data.samples import ShardSamples

T = TypeVar("T")

log = logging.getLogger(__name__)

DISTANCE = 31  # of 256 bits, in which near duplicates may differ: the advice of PDQ's authors
NEAR_AT_MOST = 500_000  # distinct pictures; their pairs are two minutes of a core, and grow with the square


def find_pictures(samples: ShardSamples, duplicates: str, workers: int) -> Pictures:
    """The duplicates among the samples, by the hashes of their images.

    Args:
        duplicates: `near`, `exact` (of equal bytes alone) or `none`.
        workers: processes that compute missing hashes.

    Raises:
        ValueError: `duplicates` is something else.
    """
    if duplicates not in ("near", "exact", "none"):
        raise ValueError(f"data.duplicates must be near, exact or none, got {duplicates}")
    if duplicates == "none":
        return NO_DUPLICATES
    files = _hash_files(samples.indexed, workers)
    said = f"{duplicates} {DISTANCE} {NEAR_AT_MOST} mirrored\n" + "\n".join(
        f"{index.samples} {name}" + (" unknown" if file is None else "")
        for index, (name, file) in zip(samples.indexed.indexes, files, strict=True)
    )
    grouped = samples.indexed.cache_dir / "pictures" / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.npy"
    found = _read_groups(grouped)
    if found is None:
        with one_at_a_time(grouped.parent, [grouped.name]):
            found = _read_groups(grouped)  # another rank may have been first
            if found is None:
                pictures = _group(samples.indexed.indexes, [file for _, file in files], near=duplicates == "near")
                made = np.stack([pictures.positions, pictures.first])  # (M,) each -> (2, M)
                write_array(grouped, made)
                found = _read_groups(grouped)
                found = made if found is None else found
    records, first = found

    def of_samples() -> Pictures:
        positions = samples.rows.positions_of(records)
        return Pictures.labelled(positions[positions >= 0], first[positions >= 0])

    return _once(len(records), f"{grouped.name} {samples.state}", samples, of_samples)


def _once(count: int, said: str, samples: ShardSamples, make: Callable[[], Pictures]) -> Pictures:
    """What `make` finds among so many records; of many, in files that all processes of a machine map."""
    if count < MANY:
        return make()

    def arrays() -> dict[str, np.ndarray]:
        made = make()
        firsts, sizes = np.unique(made.first, return_counts=True)
        return {"positions": made.positions, "first": made.first, "firsts": firsts, "sizes": sizes}

    found = once(samples.indexed.cache_dir / "pictures", said, arrays)
    return Pictures(found["positions"], found["first"], (found["firsts"], found["sizes"]))


def _read_groups(file: Path) -> np.ndarray | None:
    """Records that have a duplicate, and the first of each one's group; None where that is not known yet. (2, M)"""
    found = read_array(file)
    return found if found is not None and found.ndim == 2 and len(found) == 2 and found.dtype == np.int64 else None


def read_pictures_from(path: str | Path, samples: ShardSamples) -> Pictures:
    """The duplicates that `memtrain shards duplicates` found, as far as they are among the samples.

    Raises:
        ValueError: it is no such file, or is of another corpus.
    """

    def of_table() -> Pictures:
        table = read_groups(path, "data.repeats_from")
        keys = table["key"]
        positions = samples.look_up(keys)
        known = positions >= 0
        if not known.any():
            named = f"such as {keys[0]}, is" if len(keys) else "is"
            raise ValueError(
                f"data.repeats_from={path}: none of its {len(keys)} keys, {named} in data.shards; was it made from "
                "another corpus?"
            )
        if not known.all():
            log.warning(
                "data.repeats_from: %d of its %d keys are not in data.shards, such as %s",
                (~known).sum(), len(keys), keys[int(np.argmin(known))],
            )  # fmt: skip
        return Pictures.labelled(positions[known], table["group"].to_numpy()[known])

    count = rows_of(path)
    return of_table() if count < MANY else _once(count, f"{file_state(path)}\n{samples.state}", samples, of_table)


def _hash_files(indexed: IndexedShards, workers: int) -> list[tuple[str, str | None]]:
    """For each shard what names the state that was hashed, and the file of its hashes; None where there is none."""
    shards, indexes = indexed.shards, indexed.indexes
    folder = indexed.cache_dir / "hashes"
    named = [indexed.identity(number, "hashes") for number in range(len(shards))]
    files = [index.hash_file or f"{folder}/{name}.npy" for index, name in zip(indexes, named, strict=True)]

    def lacking() -> set[int]:
        return {n for n, index in enumerate(indexes) if read_hashes(files[n], index.samples) is None}

    missing = lacking()
    if any(not shards[number].is_remote for number in missing):
        with one_at_a_time(folder, named):
            unhashed = sorted(number for number in lacking() if not shards[number].is_remote)
            rows = sum(indexes[number].samples for number in unhashed)
            if rows >= 10_000:
                log.info("hashing %d images once, to know duplicates (data.duplicates=none leaves that out)", rows)
            _over_shards([(indexes[n], Path(shards[n].url), files[n]) for n in unhashed], workers)
        missing = lacking()
    remote = [shards[number].name for number in sorted(missing) if shards[number].is_remote]
    if remote:
        log.warning(
            "duplicates in %d remote shards, such as %s, are not known: their index files have no image hashes; "
            "run `memtrain shards index` where the shards lie, and put what it writes beside them",
            len(remote), remote[0],
        )  # fmt: skip
    return [(name, None if n in missing else file) for n, (name, file) in enumerate(zip(named, files, strict=True))]


def _over_shards(missing: Sequence[tuple[IndexFile, Path, str]], workers: int) -> None:
    def bar(items: Iterable[T]) -> Iterable[T]:
        return track(items, "Hashing images", total=len(missing), disable=len(missing) < 20)

    if workers > 1 and len(missing) >= 4 * workers:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            causes = list(bar(pool.map(_write_hashes, missing, chunksize=4)))
    else:
        causes = [_write_hashes(part) for part in bar(missing)]
    for (_, shard, _), cause in zip(missing, causes, strict=True):
        if cause is not None:
            log.warning("duplicates in %s are not known, its images cannot be hashed: %s", shard, cause)


def _write_hashes(part: tuple[IndexFile, Path, str]) -> str | None:
    """Why the images of the shard cannot be hashed; training says what becomes of a shard that is gone."""
    index, shard, file = part
    try:
        if not index.is_of(shard.stat()):
            return "it has changed since it was indexed"
        found = shard_hashes(shard, index.records()["image"])
    except OSError as error:
        return error.strerror or str(error)
    write_array(file, found)
    return None


def _group(indexes: Sequence[IndexFile], files: Sequence[str | None], near: bool) -> Pictures:
    """The duplicates among all records of the indexes, numbered shard by shard."""
    ends = np.cumsum([index.samples for index in indexes]).tolist()
    hashed = [
        (end - index.samples, index.samples, file)
        for end, index, file in zip(ends, indexes, files, strict=True)
        if file is not None
    ]
    if not near or sum(count for _, count, _ in hashed) > NEAR_AT_MOST:
        pictures, distinct = _exact(hashed)
        if not near:
            return pictures
        if distinct > NEAR_AT_MOST:
            log.warning(
                "%d distinct pictures are too many to look for near duplicates at the start: exact ones alone are "
                "known; data.repeats_from takes what `memtrain shards duplicates` finds", distinct,
            )  # fmt: skip
            return pictures
    parts = [np.zeros(0, HASHES)]
    numbers = [np.zeros(0, np.int64)]
    for start, count, file in hashed:
        found = read_hashes(file, count)
        assert found is not None, f"{file} was whole a moment ago"
        parts.append(found)
        numbers.append(np.arange(start, start + count))
    hashes, records = np.concatenate(parts), np.concatenate(numbers)
    _, digests = np.unique(hashes["sha256"], return_inverse=True)
    labels = components(digests, hashes["pdq"], hashes["quality"], DISTANCE)
    return Pictures.labelled(records, labels)


def _exact(hashed: Sequence[tuple[int, int, str]]) -> tuple[Pictures, int]:
    """The records whose images have equal bytes, and how many distinct images there are; 8 bytes a record meanwhile.

    Args:
        hashed: of each shard the number of its first record, how many it has, and the file of their hashes.
    """

    def digests_of(file: str, count: int) -> np.ndarray:
        found = read_hashes(file, count)
        assert found is not None, f"{file} was whole a moment ago"
        return found["sha256"]

    digests = np.empty(sum(count for _, count, _ in hashed), dtype=np.uint64)
    end = 0
    for _, count, file in hashed:
        digests[end : end + count] = digests_of(file, count)
        end += count
    digests.sort()
    again = digests[1:] == digests[:-1]
    distinct = len(digests) - int(again.sum())
    repeated = np.unique(digests[1:][again])
    del digests, again
    records, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start, count, file in hashed if len(repeated) else ():
        found = digests_of(file, count)
        place = np.searchsorted(repeated, found).clip(max=len(repeated) - 1)
        [rows] = np.nonzero(repeated[place] == found)
        records.append(start + rows)
        labels.append(place[rows])
    return Pictures.labelled(np.concatenate(records), np.concatenate(labels)), distinct
