"""Shards that are being packed: a hidden folder beside the one that they are for, until all of them are whole.

A stopped `memtrain shards pack` goes on there; parts of one, started anywhere, write into the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from memtrain.core.files import written_aside
from memtrain.data.distribute import Part
from memtrain.data.kept import alone, one_at_a_time
from memtrain.data.pack_source import Row


@dataclass(frozen=True)
class PackedShard:
    """What became of a shard's rows: how many are samples, and (path as given, why) of those that are not."""

    rows: str  # a hash of them, and of the state of their pictures
    samples: int
    failures: list[tuple[str, str]]


class Packing:
    """The folder in which the shards of `out` are gathered.

    Args:
        settings: what decides the shards, beside their rows; JSON values.
        is_part: others may be at work on other shards: what they have made is never thrown away.

    Raises:
        ValueError: shards of other settings are there, and this is a part.
    """

    def __init__(self, out: Path, settings: dict, is_part: bool):
        self.out, self.folder = out, out.with_name(f".{out.name}.packing")
        self.notes = self.folder / ".notes"
        self.notes.mkdir(parents=True, exist_ok=True)
        said, file = json.dumps(settings), self.notes / "settings.json"
        with one_at_a_time(self.notes, ["settings.json"]):
            if file.is_file() and file.read_text(encoding="utf-8") != said:
                if is_part:
                    raise ValueError(f"{self.folder} holds shards of another source or other options; delete it")
                shutil.rmtree(self.folder)
                self.notes.mkdir(parents=True)
            with written_aside(file, shared=True) as aside:
                aside.write_text(said, encoding="utf-8")

    def alone(self, part: Part) -> AbstractContextManager[None]:
        """While one process packs this part, no other can. Raises ValueError where one does."""
        return alone(self.notes / f"{part.number}-{part.count}.lock", f"wait for it (part={part})")

    def finish(self) -> None:
        """Give the folder its name."""
        shutil.rmtree(self.notes)
        os.replace(self.folder, self.out)

    def discard(self) -> None:
        shutil.rmtree(self.folder)


def noted(folder: Path, name: str) -> PackedShard | None:
    """What became of the shard of this name in the folder of a `Packing`; None where it is not there yet."""
    try:
        said = json.loads((folder / ".notes" / f"{name}.json").read_text(encoding="utf-8"))
        failures = [(path, why) for path, why in said["failures"]]
        return PackedShard(said["rows"], said["samples"], failures)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note(folder: Path, name: str, shard: PackedShard, aside: Path) -> None:
    """Move a shard's files, which lie in a folder aside, to where they belong, and note last that they are there."""
    for file in aside.iterdir():
        os.replace(file, folder / file.name)
    with written_aside(folder / ".notes" / f"{name}.json", shared=True) as written:
        written.write_text(json.dumps(asdict(shard)), encoding="utf-8")


def new_aside(folder: Path) -> Path:
    """A folder of one's own in that of a `Packing`."""
    aside = folder / ".notes" / f"aside-{secrets.token_hex(4)}"
    aside.mkdir()
    return aside


def state_of(rows: Iterable[Row]) -> str:
    """A hash of rows and of size and time of their pictures: another one where a shard of them would differ."""
    digest = hashlib.sha256()
    for row in rows:
        try:
            status = os.stat(row.path)
            picture = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):  # ValueError: a path with a null byte
            picture = "none"
        said = f"{row.url!r} {row.caption!r} {row.problem!r} {picture} {sorted(row.extras.items())!r}\n"
        digest.update(said.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
