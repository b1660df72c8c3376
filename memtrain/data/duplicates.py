"""Groups of exact and near duplicates: duplication is what causes memorization.

Exact: equal sha256. Near: PDQ, the perceptual hash of 256 bits, within a Hamming distance of 31, its authors'
advice, of pictures with a PDQ quality of at least 50: a flat picture has no features to compare, and equals
only itself. PDQ survives re-encoding and resizing. A mirror image is near, too: its hash is known from that of the
picture. Crops that take away more than a few pixels in a hundred are not found.

Here they are hashed, shard by shard, into partial results (`data.partials`); `data.duplicate_groups` joins these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.data.check import encoded, image_sha256, read_extent
from memtrain.data.columns import parse_json
from memtrain.data.distribute import Distributor, Done, Part
from memtrain.data.hashes import perceptual_hash
from memtrain.data.images import BadSample
from memtrain.data.joins import opened, rows_of
from memtrain.data.partials import Manifest, make_partials
from memtrain.data.paths import GROUPS, check_file
from memtrain.data.shards import index_shard
from memtrain.data.sources import LocalShard

MAX_DISTANCE = 47  # beyond, passes become too many

COLUMNS = pa.schema(
    [
        ("group", pa.int64()),
        ("kind", pa.string()),
        ("key", pa.string()),
        ("sha256", pa.string()),
        ("pdq", pa.string()),
        ("quality", pa.int32()),
        ("caption", pa.string()),
    ]
)
# A row a sample, or, with a problem and no hashes, a row for what could not be hashed
ROWS = pa.schema(
    [
        ("key", pa.binary()),
        ("sha256", pa.binary(32)),
        ("pdq", pa.binary(32)),
        ("quality", pa.int32()),
        ("caption", pa.string()),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True)
class Duplicates:
    """`file`: a row for each sample of each group, in the columns of `COLUMNS`, the largest group first.

    A group of kind exact has one sha256; in a group of kind near, equal sha256 are exact duplicates too.
    `unreadable`: how many could not be hashed; `some_unreadable`: the first of them, (sample key, why).
    """

    file: Path
    num_samples: int
    num_groups: int
    grouped: int  # samples in groups
    unreadable: int
    some_unreadable: list[tuple[str, str]]

    def first_groups(self, count: int) -> list[tuple[int, str, str]]:
        """Size, kind and first caption of the largest groups."""
        found: list[list] = []
        last = -1
        for row in rows_of(opened(self.file)):
            if row["group"] != last:
                if len(found) == count:
                    break
                last = row["group"]
                found.append([0, row["kind"], row["caption"]])
            found[-1][0] += 1
        return [(size, kind, caption) for size, kind, caption in found]


def hash_shards(manifest: Manifest, part: Part, distributor: Distributor) -> Iterator[Done]:
    """Hash this part's shards; yields what each counts."""
    return make_partials(manifest, hash_shard, part, distributor)


def hash_shard(shard: LocalShard) -> tuple[pa.Table, dict[str, int]]:
    """A row of `ROWS` for each sample of a shard, and for each that cannot be hashed; how many there are of both."""
    rows: list[dict] = []
    problems: list[dict] = []
    try:
        entries = index_shard(shard.path).entries
        with shard.path.open("rb") as file:
            for entry in entries:
                data = read_extent(file, entry.image)
                metadata = parse_json(read_extent(file, entry.metadata)) if entry.metadata else {}
                key = encoded(entry.key)
                try:
                    pdq, quality = perceptual_hash(data)
                except BadSample as problem:
                    problems.append({"key": key, "problem": str(problem)})
                    continue
                caption = read_extent(file, entry.caption).decode("utf-8", errors="replace").strip()
                digest = image_sha256(data, metadata)
                rows.append({"key": key, "sha256": digest, "pdq": pdq, "quality": quality, "caption": caption})
    except OSError as error:
        problems.append({"key": b"", "problem": f"shard cannot be read: {error.strerror or error}"})
    counts = {"samples": len(rows), "unreadable": len(problems)}
    return pa.Table.from_pylist([*rows, *problems], ROWS), counts


def check_distance(distance: int) -> None:
    """Raises ValueError where it is out of range."""
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"--distance must be from 0 to {MAX_DISTANCE} bits, got {distance}")


def read_groups(path: str | Path, name: str) -> pa.Table:
    """Columns group and key of what `find_duplicates` found, a row a sample, as `memtrain shards duplicates` wrote it.

    Raises:
        ValueError: it is no such file; `name` is what the user called it.
    """
    file = check_file(name, path, GROUPS)
    try:
        return pq.read_table(file, columns=["group", "key"])
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{name}={path} cannot be read ({str(error).splitlines()[0]}); {GROUPS}") from error
