"""Canaries that a list names (`canaries.file`): what is repeated in a corpus, how, and how often, as its maker knows.

A csv with the columns `key`, `canary` and `kind`. Rows with the same `canary`, a whole number, are one canary; each
is a sample that shows it, so that its dose is how many rows it has. `kind` is free text. It is ground truth for
measuring: no rule learns from it, and which samples are one picture is still told by their hashes.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memtrain.data.canaries import Canary
from memtrain.data.escaping import of_cell
from memtrain.data.paths import LISTED, check_file
from memtrain.data.samples import ShardSamples

log = logging.getLogger(__name__)

COLUMNS = ("key", "canary", "kind")


@dataclass(frozen=True)
class ListedSample:
    """A row of the list: a sample that shows a canary."""

    key: str
    canary: int
    kind: str


def read_list(path: str | Path) -> list[ListedSample]:
    """The rows of a list of canaries.

    Raises:
        ValueError: in one line: no such file, a column or a number is missing, a key or a canary contradicts itself.
    """
    file = check_file("canaries.file", path, LISTED)
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            if missing := [name for name in COLUMNS if name not in columns]:
                raise ValueError(
                    f"canaries.file={path} has no column {missing[0]}, but {', '.join(columns) or 'nothing'}; {LISTED}"
                )
            rows = [_row(f"canaries.file={path}, line {reader.line_num}", cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(f"canaries.file={path} cannot be read ({error}); {LISTED}") from error
    if not rows:
        raise ValueError(f"canaries.file={path} lists nothing; {LISTED}")
    _check_rows(path, rows)
    return rows


def _row(where: str, cells: dict) -> ListedSample:
    key, number, kind = (str(of_cell(cells[name]) or "").strip() for name in COLUMNS)
    if not key:
        raise ValueError(f"{where} has no key; give the sample's, such as 00000.tar/000000012")
    if not number.isdecimal():
        raise ValueError(f"{where}: canary must be a whole number, got {number or 'nothing'}; number them from 0")
    return ListedSample(key, int(number), kind)


def _check_rows(path: str | Path, rows: Sequence[ListedSample]) -> None:
    """Raises ValueError where a key comes twice, or a canary has two kinds."""
    canary_of: dict[str, int] = {}
    kind_of: dict[int, str] = {}
    for row in rows:
        if row.key in canary_of:
            both = " and ".join(str(number) for number in dict.fromkeys((canary_of[row.key], row.canary)))
            raise ValueError(f"canaries.file={path} lists {row.key} twice, under canary {both}; list it once")
        if kind_of.setdefault(row.canary, row.kind) != row.kind:
            raise ValueError(
                f"canaries.file={path} calls canary {row.canary} both {kind_of[row.canary]} and {row.kind}; "
                "a canary is of one kind"
            )
        canary_of[row.key] = row.canary


def find_canaries(rows: Sequence[ListedSample], samples: ShardSamples, path: str | Path) -> list[Canary]:
    """The canaries of a list, in its order, as far as their samples are in the corpus.

    Args:
        path: of the list, for what is said of it.

    Raises:
        ValueError: it is of another corpus.
    """
    found = samples.look_up([row.key for row in rows])
    known = found >= 0
    if not known.any():
        raise ValueError(
            f"canaries.file={path}: none of its {len(rows)} keys, such as {rows[0].key}, is in data.shards; was it "
            "made from another corpus?"
        )
    if not known.all():
        log.warning(
            "canaries.file: %d of its %d keys are not in data.shards, such as %s: the doses of their canaries are "
            "as much smaller", (~known).sum(), len(rows), rows[int(np.argmin(known))].key,
        )  # fmt: skip
    members: dict[int, list[int]] = {}
    for row, position in zip(rows, found.tolist(), strict=True):
        if position >= 0:
            members.setdefault(row.canary, []).append(position)
    kinds = {row.canary: row.kind for row in rows}
    return [
        Canary(number, kinds[number], np.array(positions, dtype=np.int64), len(positions), is_listed=True)
        for number, positions in members.items()
    ]
