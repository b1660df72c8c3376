"""Partial results of a look at many shards: a Parquet file a shard, beside a manifest that names the shards.

A partial says which state of its shard it is true of, the size and time of the tar and of its _stats.json: one that
is true is not made again. It is written aside and renamed, so that processes that share a manifest, or follow one
another on it, double and lose nothing. Rows are numbered shard by shard: `position` = shard · 2^32 + row of the
partial.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.core.files import written_aside
from memtrain.data.distribute import Distributor, Done, Part
from memtrain.data.kept import alone
from memtrain.data.sources import LocalShard
from memtrain.data.staged import on_disk, state_of

VERSION = 1  # raise it where the same tar gives another partial
MANIFEST = "manifest.json"
_SAID = b"memtrain"  # key of what a partial says, in the file's own metadata
GIVE_MANIFEST = "give the folder or the manifest.json of `memtrain shards check` or `duplicates`"

Work = Callable[[LocalShard], tuple[pa.Table, dict[str, int]]]


@dataclass(frozen=True)
class Manifest:
    """A folder of partials: of which command, with which option, over which shards."""

    folder: Path
    command: str
    option: str  # what else a partial depends on
    shards: tuple[LocalShard, ...]

    def partial(self, shard: LocalShard) -> Path:
        """Where a shard's partial lies: under another name for every path, readable all the same."""
        digest = hashlib.sha256(os.fsencode(shard.path)).hexdigest()[:16]
        stem = re.sub(r"[^\w.-]", "_", shard.path.name)[-80:]
        return self.folder / "shards" / f"{digest}-{stem}.parquet"

    def done(self, shard: LocalShard) -> dict[str, int] | None:
        """What a shard's partial counts; None where there is none, or it is not true of the shard any more."""
        try:
            said = json.loads((pq.read_metadata(self.partial(shard)).metadata or {})[_SAID])
            return said["counts"] if said["of"] == self.state(shard) else None
        except (OSError, ValueError, KeyError, TypeError):  # an error of pyarrow is a ValueError, too
            return None

    def state(self, shard: LocalShard) -> list:
        """What a partial is true of, as it is now."""
        return [VERSION, self.command, self.option, shard.name, *state_of(shard)]

    def identity(self) -> str:
        """A name for the state of all shards."""
        states = json.dumps([self.state(shard) for shard in self.shards])
        return hashlib.sha256(states.encode(errors="surrogateescape")).hexdigest()[:16]


def open_manifest(folder: Path, command: str, option: str, shards: Sequence[LocalShard]) -> Manifest:
    """The manifest of a command in a folder, which is made where it is not there yet; it names these shards now.

    Raises:
        ValueError: it is that of another command.
    """
    found = Manifest(_folder_of(folder), command, option, tuple(shards))
    if (found.folder / MANIFEST).exists():
        there = read_manifest(found.folder)
        if there.command != command:
            raise ValueError(f"manifest={folder} is of memtrain shards {there.command}; name another folder")
        if there == found:
            return found
    (found.folder / "shards").mkdir(parents=True, exist_ok=True)
    said = {
        "command": command,
        "option": option,
        "shards": [[os.fsdecode(shard.path), shard.name, shard.url] for shard in shards],
    }
    with written_aside(found.folder / MANIFEST, shared=True) as aside:
        aside.write_text(json.dumps(said, indent=1), encoding="utf-8")
    return found


def read_manifest(path: Path) -> Manifest:
    """Raises ValueError where there is none."""
    folder = _folder_of(path)
    try:
        said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        shards = tuple(LocalShard(Path(path), name, *url) for path, name, *url in said["shards"])
        return Manifest(folder, str(said["command"]), str(said["option"]), shards)
    except OSError as error:
        raise ValueError(f"{path} is no manifest ({error.strerror}); {GIVE_MANIFEST}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest; {GIVE_MANIFEST}") from error


def _folder_of(path: Path) -> Path:
    path = Path(os.path.abspath(path.expanduser()))
    return path.parent if path.name == MANIFEST else path


def make_partials(manifest: Manifest, work: Work, part: Part, distributor: Distributor) -> Iterator[Done]:
    """Make the partials of this part's shards, but for those that are there; yields what each counts, as it is done.

    Raises:
        ValueError: another process does the same part.
    """
    shards = [manifest.shards[place] for place in part.of(len(manifest.shards))]
    remedy = "wait until it ends, or share the work with part=1/2 and part=2/2"
    with alone(manifest.folder / f".part-{part.number}-of-{part.count}.lock", remedy):
        yield from distributor.run(partial(_make, manifest, work), shards, name=_name)


def _name(shard: LocalShard) -> str:
    return shard.name


def _make(manifest: Manifest, work: Work, shard: LocalShard) -> dict[str, int]:
    """A shard's partial, where there is none that is true of it. Raises OSError where it changes meanwhile."""
    if (there := manifest.done(shard)) is not None:
        return there | {"kept": 1}
    before = manifest.state(shard)
    with on_disk(shard) as local:
        table, counts = work(local)
    if manifest.state(shard) != before:
        raise OSError(f"{shard.name} changes while it is read; wait until it is finished")
    write_partial(manifest, shard, before, table, counts)
    return counts | {"kept": 0}


def write_partial(manifest: Manifest, shard: LocalShard, state: list, table: pa.Table, counts: dict[str, int]) -> None:
    """Write what was found in a shard when it was in this state."""
    said = json.dumps({"of": state, "counts": counts}).encode(errors="surrogateescape")
    target = manifest.partial(shard)
    with written_aside(target, shared=True) as aside, full_disk_named(target):
        pq.write_table(table.replace_schema_metadata({_SAID: said}), aside, compression="zstd")


def all_done(manifest: Manifest) -> list[tuple[LocalShard, dict[str, int]]]:
    """Shards, in their order, and what each partial counts; those without one are left out."""
    found = ((shard, manifest.done(shard)) for shard in manifest.shards)
    return [(shard, counts) for shard, counts in found if counts is not None]


def merging(manifest: Manifest) -> contextlib.AbstractContextManager[None]:
    """Raises ValueError where another process joins these partials."""
    return alone(manifest.folder / ".joining.lock", "it joins the partial results; wait until it ends")


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Errors of a full disk name the file: libraries say it in words of their own."""
    try:
        yield
    except Exception as error:
        if (
            not isinstance(error, OSError)
            and "No space left" not in str(error)
            and "failed to offload" not in str(error)
        ):
            raise
        full = "No space left" in str(error) or "max_temp_directory" in str(error)
        code = errno.ENOSPC if full else getattr(error, "errno", None) or errno.EIO
        raise OSError(code, os.strerror(code), os.fspath(path)) from error
