"""Validate a corpus: what training would lose, and what is odd but costs nothing, by shard and sample.

Shard by shard into partial results (`data.partials`), then equal images and keys by joins over all of them
(`data.joins`). In memory at once: counts of each shard, and what a setting allows the joins.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from memtrain.data.distribute import Distributor, Done, Part
from memtrain.data.images import FOREIGN, BadSample, decode_image
from memtrain.data.partials import Manifest, make_partials
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
DECODED, TRUSTED = "decoded", "trusted"  # what was done with images; a manifest's option
_SKIPPED = {  # causes of index_shard that are of a sample; all others are damage
    "no image": "no_image",
    "no caption": "no_caption",
    "key occurs twice in the shard": "duplicate_key",
    DAMAGED: "damage",
}
# A row a complete sample, then a row a fault: a sample has a sha256, a fault a kind. Keys are bytes, as they are
# in the tar
ROWS = pa.schema(
    [
        ("key", pa.binary()),
        ("sha256", pa.binary(32)),
        ("kind", pa.string()),
        ("cause", pa.binary()),
        ("lost", pa.bool_()),
    ]
)
_DECODED_SIDE = 64  # px; a JPEG is decoded at 1/8 of its size where that is enough


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


def check_shards(manifest: Manifest, part: Part, distributor: Distributor) -> Iterator[Done]:
    """Check this part's shards, each by itself; yields what each counts. `manifest.option` is what `decoded` says."""
    return make_partials(manifest, partial(_checked, decode=manifest.option == DECODED), part, distributor)


def _checked(shard: LocalShard, decode: bool) -> tuple[pa.Table, dict]:
    """A shard's partial, and what it counts."""
    report, samples = check_shard(shard, decode)
    faults = [
        {"key": encoded(fault.key), "kind": fault.kind, "cause": encoded(fault.cause), "lost": fault.lost}
        for fault in report.faults
    ]
    counts = {name: getattr(report, name) for name in ("samples", "complete", "successes")}
    lost = sum(fault.lost for fault in report.faults)
    return pa.concat_tables([samples, pa.Table.from_pylist(faults, ROWS)]), counts | {"lost": lost} | report.counts


def encoded(text: str) -> bytes:
    """Text of a tar as the bytes that it was, also where these are not UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def check_shard(shard: LocalShard, decode: bool) -> tuple[ShardReport, pa.Table]:
    """What is wrong inside a shard, and a row of `ROWS` for each complete sample. Bad data raises nothing."""
    report = ShardReport(shard.name)
    fingerprints: list[tuple[bytes, bytes]] = []
    try:
        fingerprints += _check_samples(shard.path, report, decode)
    except OSError as error:
        report.note("damage", "", f"shard cannot be read: {error.strerror or error}", lost=True)
    _check_stats(shard.path, report)
    rows = [{"key": key, "sha256": digest} for key, digest in fingerprints]
    return report, pa.Table.from_pylist(rows, ROWS)


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
            yield encoded(entry.key), image_sha256(image, metadata or {})


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
