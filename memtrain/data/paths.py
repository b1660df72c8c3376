"""Paths, patterns and URLs that a config names: what they stand for, and what is said where nothing is there.

Imports nothing that takes long, so that a command refuses a wrong path before torch is loaded.
"""

from __future__ import annotations

import re
from pathlib import Path

from braceexpand import braceexpand

LEDGER = "ledger"  # in a run's folder
TABLES = (".parquet", ".jsonl", ".csv")  # of pictures, that can be packed
# what keys that name a file take
KEYS = "give what `memtrain ledger suspects` wrote, or a .txt with a key a line"
GROUPS = "give what `memtrain shards duplicates` wrote"
LISTED = (
    "give a csv with the columns key, canary, kind, a row a sample that shows a canary, as `memtrain demo` writes "
    "beside its shards; or say canaries.file=null"
)
SAMPLES = "name a csv or parquet with a column key, or leave it out"
FORGET = "name a list of prompts, or what `memtrain detect`, `ledger suspects` or `shards duplicates` wrote"
CHECKPOINT = "name a runs/…/checkpoints/last.ckpt"
TORCHSCRIPT = "name a TorchScript file"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LEDGER_PART = re.compile(r"rank(\d+)-(\d+)\.parquet")


def config_folder() -> Path:
    """conf/ inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def scheme_of(url: str) -> str:
    """`s3` of s3://…, in small letters; empty where there is none, as of a path."""
    scheme = _SCHEME.match(url)
    return scheme[1].lower() if scheme else ""


def is_remote(url: str) -> bool:
    """Whether it takes an opener to read: `pipe:COMMAND` or any SCHEME:// but file://."""
    return url.startswith("pipe:") or scheme_of(url) not in ("", "file")


def expand(pattern: str) -> list[str]:
    """What a brace pattern such as `{00000..00041}.tar` stands for; `::` joins several. As webdataset reads it."""
    return [path for part in pattern.split("::") for path in braceexpand(part)]


def check_file(key: str, path: str | Path, remedy: str) -> Path:
    """The file that `key` names, `~` expanded. Raises ValueError where there is none."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"{key}={path} is a folder; {remedy}")
    if not file.is_file():
        raise ValueError(f"{key}={path}: no such file; {remedy}")
    return file


def check_pictures(source: Path) -> None:
    """Raises ValueError where `source` is neither a folder nor a table."""
    if not (source.is_dir() or (source.suffix.lower() in TABLES and source.is_file())):
        raise ValueError(f"{source} is neither a folder nor a {', '.join(TABLES)} file; name one of these")


def check_empty(out: Path) -> None:
    """Raises ValueError where anything but an empty folder is there."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"{out} is there and is not an empty folder; delete it or choose another")


def check_run(folder: Path) -> Path:
    """The folder of a run, resolved. Raises ValueError where it is none."""
    folder = folder.resolve()
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.csv", LEDGER)):
        raise ValueError(f"{folder} is no run, without config.yaml, metrics.csv, ledger; name runs/NAME/ID")
    return folder


def ledger_parts(folder: Path) -> list[tuple[int, int, Path]]:
    """(number, rank, file) of each part of the ledger in this folder, in order."""
    found = [(_LEDGER_PART.fullmatch(path.name), path) for path in folder.glob("rank*.parquet")]
    return sorted((int(match[2]), int(match[1]), path) for match, path in found if match)


def check_ledger(run: str | Path) -> list[Path]:
    """The parts of a run's ledger, in order. Raises ValueError where it has none."""
    parts = [path for _, _, path in ledger_parts(Path(run) / LEDGER)]
    if not parts:
        raise ValueError(
            f"{run} has no ledger; name a run's folder (written at the first checkpoint, unless ledger=off)"
        )
    return parts
