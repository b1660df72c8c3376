"""Validate a corpus: what training would lose, and what is odd but costs nothing, by shard and sample.

In memory at once: the list of faults, and about 350 bytes a sample, for its key and its sha256.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch

from memtrain.data.images import FOREIGN, BadSample, decode_image
from memtrain.data.shards import DAMAGED, Extent, holds_header, index_shard
from memtrain.data.sources import LocalShard

KINDS = (
    "damage",  # the tar is empty, cut, joined to another, no tar, or gone
    "no_image",
    "no_caption",
    "duplicate_key",
    "unreadable_image",
    "empty_caption",
    "caption_not_utf8",
    "bad_json",
    "duplicate_within",  # the image of an earlier sample of the shard
    "duplicate_across",  # the image of an earlier shard
    "key_across",  # keys of an earlier shard; noted once a shard
    "stats_missing",
    "stats_disagree",
)
_SKIPPED = {  # causes of index_shard that are of a sample; all others are damage
    "no image": "no_image",
    "no caption": "no_caption",
    "key occurs twice in the shard": "duplicate_key",
    DAMAGED: "damage",
}
_FINGERPRINTS = pa.schema([("key", pa.binary()), ("sha256", pa.binary(32))])
_DECODED_SIDE = 64  # px; a JPEG is decoded at 1/8 of its size where that is enough

Progress = Callable[[Iterable, int], Iterable]  # wraps an iterable and its length


@dataclass(frozen=True)
class Fault:
    """What is wrong with a sample, or with a shard where `key` is empty. `lost`: training does without it."""

    shard: str
    key: str
    kind: str
    cause: str
    lost: bool

    @property
    def name(self) -> str:
        return f"{self.shard}/{self.key}" if self.key else self.shard


@dataclass
class ShardReport:
    """What is wrong with a shard: of `samples` keys in it, `complete` have an image that can be read and a caption.

    `successes` is what _stats.json counts, None without one.
    """

    name: str
    samples: int = 0
    complete: int = 0
    successes: int | None = None
    faults: list[Fault] = field(default_factory=list)

    def note(self, kind: str, key: str, cause: str, lost: bool = False) -> None:
        self.faults.append(Fault(self.name, key, kind, cause, lost))

    @property
    def counts(self) -> dict[str, int]:
        """Faults of each kind, zeros included."""
        found = Counter(fault.kind for fault in self.faults)
        return {kind: found[kind] for kind in KINDS}


@dataclass
class CorpusReport:
    shards: list[ShardReport]
    decoded: bool

    @property
    def faults(self) -> list[Fault]:
        """Of all shards, those that lose something first."""
        faults = [fault for shard in self.shards for fault in shard.faults]
        return sorted(faults, key=lambda fault: not fault.lost)

    @property
    def loses(self) -> bool:
        return any(fault.lost for shard in self.shards for fault in shard.faults)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        shards = [
            {
                "name": shard.name,
                "samples": shard.samples,
                "complete": shard.complete,
                "successes": shard.successes,
                "faults": shard.counts,
            }
            for shard in self.shards
        ]
        total = {
            "shards": len(self.shards),
            "samples": sum(shard.samples for shard in self.shards),
            "complete": sum(shard.complete for shard in self.shards),
            "faults": {kind: sum(shard.counts[kind] for shard in self.shards) for kind in KINDS},
        }
        return {
            "loses": self.loses,
            "decoded": self.decoded,
            "total": total,
            "shards": shards,
            "faults": [asdict(fault) for fault in self.faults],
        }


def over_shards(work: Callable, shards: Sequence[LocalShard], workers: int, progress: Progress) -> Iterator:
    """`work(shard)` of each shard, in their order, by `workers` processes; by this one where 1 is enough."""
    if workers < 1:
        raise ValueError(f"--workers must be >= 1, got {workers}")
    if min(workers, len(shards)) == 1:
        yield from progress(map(work, shards), len(shards))
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used torch's threads may hang
    one_thread = torch.set_num_threads, (1,)  # each: the processes fill the cores
    with ProcessPoolExecutor(min(workers, len(shards)), spawn, *one_thread) as pool:
        yield from progress(pool.map(work, shards), len(shards))


def check(shards: Sequence[LocalShard], decode: bool, workers: int, progress: Progress) -> CorpusReport:
    """Check every shard by itself, then look for equal images and keys among all of them.

    Args:
        decode: decode every image; without, an image is bad only where it has no bytes.
    """
    found = list(over_shards(partial(check_shard, decode=decode), shards, workers, progress))
    report = CorpusReport([shard for shard, _ in found], decode)
    _note_repeats(report.shards, [fingerprints for _, fingerprints in found])
    return report


def check_shard(shard: LocalShard, decode: bool) -> tuple[ShardReport, pa.Table]:
    """What is wrong inside a shard; key and sha256 of its complete samples. Bad data raises nothing."""
    report = ShardReport(shard.name)
    fingerprints: list[tuple[bytes, bytes]] = []
    try:
        fingerprints += _check_samples(shard.path, report, decode)
    except OSError as error:
        report.note("damage", "", f"shard cannot be read: {error.strerror or error}", lost=True)
    _check_stats(shard.path, report)
    rows = [dict(zip(_FINGERPRINTS.names, row, strict=True)) for row in fingerprints]
    return report, pa.Table.from_pylist(rows, _FINGERPRINTS)


def _check_samples(path: Path, report: ShardReport, decode: bool) -> Iterator[tuple[bytes, bytes]]:
    """Note what is wrong with a shard's samples; yields key and sha256 of those that are complete."""
    index = index_shard(path)
    report.samples = len(index.entries) + sum(why in _SKIPPED for _, why in index.skipped)
    for key, why in index.skipped:
        report.note(_SKIPPED.get(why, "damage"), key, why, lost=True)
    with path.open("rb") as file:
        for entry in index.entries:
            image = read_extent(file, entry.image)
            metadata = _parse_json(read_extent(file, entry.metadata)) if entry.metadata else {}
            if metadata is None:
                report.note("bad_json", entry.key, "json is broken")
            _check_caption(read_extent(file, entry.caption), entry.key, report)
            try:
                if decode:
                    decode_image(image, _DECODED_SIDE, _DECODED_SIDE)
                elif not image:
                    raise BadSample("image has no bytes")
                elif holds_header(image):
                    raise BadSample(FOREIGN)
            except BadSample as problem:
                report.note("unreadable_image", entry.key, str(problem), lost=True)
                continue
            report.complete += 1
            yield entry.key.encode("utf-8", "surrogateescape"), image_sha256(image, metadata or {})


def read_extent(file: BinaryIO, extent: Extent) -> bytes:
    """The bytes of a member of a tar."""
    file.seek(extent.offset)
    return file.read(extent.size)


def image_sha256(image: bytes, metadata: dict) -> bytes:
    """The json's sha256, which is of the bytes before they were resized; without one, that of the bytes."""
    said = metadata.get("sha256")
    if isinstance(said, str) and re.fullmatch("[0-9a-fA-F]{64}", said):
        return bytes.fromhex(said)
    return hashlib.sha256(image).digest()


def _parse_json(data: bytes) -> dict | None:
    """A sample's json; None where it is no json object. A bare NaN is as good as null."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _check_caption(caption: bytes, key: str, report: ShardReport) -> None:
    try:
        text = caption.decode("utf-8")
    except UnicodeDecodeError:
        report.note("caption_not_utf8", key, "caption is not UTF-8: what is not shows as \ufffd")
    else:
        if not text.strip():
            report.note("empty_caption", key, "caption is empty")


def _check_stats(path: Path, report: ShardReport) -> None:
    """Note where the _stats.json beside a shard is missing, or counts other samples than the tar has."""
    stats = path.with_name(f"{path.stem}_stats.json")
    try:
        successes = json.loads(stats.read_bytes())["successes"]
        if type(successes) is not int:
            raise TypeError("successes is not a number")
    except FileNotFoundError:
        report.note("stats_missing", "", f"no {stats.name}: the shard may be unfinished")
        return
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        report.note("stats_missing", "", f"{stats.name} cannot be read ({type(error).__name__})")
        return
    report.successes = successes
    if successes != report.samples:
        cause = f"{stats.name} counts {successes} successes, the shard has {report.samples} samples"
        report.note("stats_disagree", "", cause, lost=report.samples < successes)


def _note_repeats(reports: Sequence[ShardReport], tables: Sequence[pa.Table]) -> None:
    """Note equal images and keys in the reports, by the keys and sha256 of each shard's samples.

    All N rows of the corpus are numbered shard by shard; each is compared with the first one that equals it.
    """
    lengths = np.array([len(table) for table in tables])
    start, shard = lengths.cumsum() - lengths, np.repeat(np.arange(len(tables)), lengths)  # (N,)

    def key(row: int) -> str:
        found = tables[shard[row]]["key"][int(row - start[shard[row]])]
        return found.as_py().decode("utf-8", "surrogateescape")

    samples, rows = pa.concat_tables(tables), np.arange(len(shard))
    in_corpus = first_equal(codes(samples["sha256"]))
    in_shard = start[shard] + np.concatenate([first_equal(codes(table["sha256"])) for table in tables])
    for row in np.flatnonzero(in_shard != rows).tolist():
        reports[shard[row]].note("duplicate_within", key(row), f"same image as {key(in_shard[row])}")
    for row in np.flatnonzero((in_shard == rows) & (shard[in_corpus] != shard)).tolist():
        other = in_corpus[row]
        cause = f"same image as {reports[shard[other]].name}/{key(other)}"
        reports[shard[row]].note("duplicate_across", key(row), cause)
    first = first_equal(codes(samples["key"]))
    # keys of earlier shards, noted once a shard: how many it has, and the first of them
    repeated = np.flatnonzero(shard[first] != shard)
    for number, place, count in zip(*np.unique(shard[repeated], True, False, True), strict=True):
        row = repeated[place]
        more = f", as are {count - 1} more of the shard" if count > 1 else ""
        cause = f"key is in {reports[shard[first[row]]].name} too{more}; a sample is its shard and its key"
        reports[number].note("key_across", key(row), cause)


def codes(column: pa.ChunkedArray) -> np.ndarray:
    """A number for each distinct value, counted from 0. (N,) int64"""
    encoded = column.dictionary_encode()  # all chunks share one dictionary
    return np.concatenate([np.empty(0, np.int64), *(chunk.indices.to_numpy() for chunk in encoded.chunks)])


def first_equal(numbers: np.ndarray) -> np.ndarray:
    """Of each number, from 0 to less than N, the place of the first one that equals it. (N,) -> (N,)"""
    first = np.empty(len(numbers), dtype=np.int64)
    first[numbers[::-1]] = np.arange(len(numbers))[::-1]  # the last to be written stays
    return first[numbers]
