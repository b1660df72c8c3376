"""The training samples that a model is judged on: of a file with a column `key`, or drawn."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.core.exclusion import GROUP_NAMES, REFERENCE
from memtrain.core.streams import Stream, place_seed
from memtrain.data.escaping import of_cell
from memtrain.data.foreign import is_foreign
from memtrain.data.groups import HELD_OUT, draw_groups
from memtrain.data.images import BadSample
from memtrain.data.paths import SAMPLES, check_file
from memtrain.data.samples import ShardSamples

log = logging.getLogger(__name__)

DRAWN = "drawn"  # group of what no file names
GROUP = "group"  # column that is looked for, but need not be there


@dataclass(frozen=True)
class TrainingSamples:
    """N samples of the corpus, each with a readable picture and a caption."""

    positions: list[int]
    keys: list[str]
    captions: list[str]
    groups: list[str]
    others_held_out: list[int] = field(default_factory=list)  # positions that were not trained on, and are not judged

    def __len__(self) -> int:
        return len(self.positions)

    def never_trained_on(self) -> set[int]:
        """Positions of all samples of which that is known."""
        reference = GROUP_NAMES[REFERENCE]
        own = (place for place, group in zip(self.positions, self.groups, strict=True) if group == reference)
        return {*own, *self.others_held_out}


def choose(samples: ShardSamples, file: str | None, group: str, count: int, seed: int) -> TrainingSamples:
    """`count` samples drawn by seed; of a file, the first `count` of each group.

    What else the file names of the groups `reference` and `held_out` was not trained on, and is not judged.

    Args:
        file: `.csv` (comma) or `.parquet` with a column `key`, as `memtrain train` writes canaries.csv, and
            where it has them `caption`, else the shards' own, and a column of groups.
        group: name of that column.

    Raises:
        ValueError: in one line: no such file, no column `key`, a key not in the corpus, nothing usable.
    """
    if count < 1:
        raise ValueError(f"samples.count must be >= 1, got {count}")
    if file is None:
        positions = draw_positions(samples, count, place_seed(seed, Stream.JUDGED, 0, 0))
        rows = [{"key": samples.key(position), "group": DRAWN} for position in positions]
    else:
        listed = _in_shards(_read(file, group), file)
        rows = _first_of_each_group([row for row in listed if row["group"] != HELD_OUT], count)
        positions = samples.find([row["key"] for row in rows]).tolist()
        never = samples.look_up([row["key"] for row in listed if row["group"] in (GROUP_NAMES[REFERENCE], HELD_OUT)])
        others = sorted({*never[never >= 0].tolist()} - {*positions})
        return replace(_usable(samples, positions, rows), others_held_out=others)
    return _usable(samples, positions, rows)


def draw_positions(samples: ShardSamples, count: int, seed: int) -> list[int]:
    """Positions without repetition, from few shards where there are many; all of a small corpus."""
    if count >= len(samples):
        return list(range(len(samples)))
    return draw_groups(samples.counts, seed, count, 0).canary.tolist()


def read_pictures(samples: ShardSamples, positions: list[int], size: tuple[int, int]) -> np.ndarray:
    """(B, height, width, 3) uint8, the middle of each picture at this size in px. Raises BadSample."""
    return np.stack([samples.get(position, size=size)[0] for position in positions]).transpose(0, 2, 3, 1)


def _usable(samples: ShardSamples, positions: list[int], rows: list[dict]) -> TrainingSamples:
    kept, problems = [], Counter()
    for position, row in zip(positions, rows, strict=True):
        try:
            own = samples.get(position)[1]
        except BadSample as problem:
            log.warning("left out %s: %s", row["key"], problem)
            problems[str(problem)] += 1
            continue
        caption = row.get("caption") or own
        if not caption:
            log.warning("left out %s: empty caption", row["key"])
            problems["empty caption"] += 1
            continue
        shown = row["key"].encode("utf-8", "replace").decode()  # a file's name may hold any bytes
        kept.append((position, shown, caption, row["group"]))
    if not kept:
        causes = ", ".join(f"{number} {why}" for why, number in problems.most_common(3))
        raise ValueError(
            f"none of the {len(rows)} chosen samples can be used ({causes}); choose others with samples=FILE"
        )
    return TrainingSamples(*(list(column) for column in zip(*kept, strict=True)))


def _in_shards(rows: list[dict], file: str) -> list[dict]:
    """The rows without foreign pictures, which a run's canaries.csv names beside samples of the shards."""
    kept = [row for row in rows if not is_foreign(row["key"])]
    if len(kept) < len(rows):
        log.info("left out %d foreign pictures of %s: they are in no shard", len(rows) - len(kept), file)
    return kept


def _first_of_each_group(rows: list[dict], count: int) -> list[dict]:
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row["group"]] += 1
        if seen[row["group"]] <= count:
            kept.append(row)
    return kept


def _read(file: str, group: str) -> list[dict]:
    """Rows with `key` and `group`, and `caption` where there is one."""
    path = check_file("samples", file, SAMPLES)
    if path.suffix.lower() == ".parquet":
        names, rows = _read_parquet(path, group)
    elif path.suffix.lower() == ".csv":
        names, rows = _read_csv(path)
    else:
        raise ValueError(f"samples={file} must end in .csv or .parquet")
    found = ", ".join(repr(name) for name in names[:12]) or "nothing"
    if "key" not in names:
        raise ValueError(f"samples={file} has no column key (SHARD.tar/KEY), but {found}")
    if group not in names and group != GROUP:
        raise ValueError(f"samples.group={group}: {file} has no such column, but {found}")
    if not rows:
        raise ValueError(f"samples={file} is empty; it needs at least one sample")
    read = []
    for row in rows:
        name, caption = row.get(group), str(row.get("caption") or "").strip()
        shown = "samples" if name in (None, "") else str(name)
        read.append({"key": str(row["key"]), "caption": caption, "group": shown})
    return read


def _read_csv(path: Path) -> tuple[list[str], list[dict]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = [{name: of_cell(text) for name, text in row.items()} for row in reader]
            return list(reader.fieldnames or []), rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"samples={path} is no csv in UTF-8: {error}") from error


def _read_parquet(path: Path, group: str) -> tuple[list[str], list[dict]]:
    try:
        names = pq.read_schema(path).names
        wanted = [name for name in dict.fromkeys(("key", "caption", group)) if name in names]
        return names, pq.read_table(path, columns=wanted).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"samples={path} is no parquet file: {str(error).splitlines()[0]}") from error
