"""What a model is to forget: prompts, and their pictures where a list names them, from what other commands wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memtrain.audit.prompts import COLUMNS, MEMORIZED, label_of, read_rows
from memtrain.data.escaping import of_cell
from memtrain.data.paths import FORGET

_FLAGGED = "flagged"  # of detect's scores.parquet


@dataclass(frozen=True)
class Entry:
    """A picture that is to be forgotten, by its prompt, its picture or both. None: not said."""

    caption: str | None
    key: str | None  # of a sample
    file: Path | None  # of a picture
    picture: str | None = None  # which one it shows: entries of one picture and caption are one


def read_forget_list(path: str | Path, column: str | None = None, label: str | None = None) -> list[Entry]:
    """The entries of a list in its order, each once.

    Of a table that `memtrain detect` wrote, those that are flagged; samples in one that `shards duplicates` or
    `ledger suspects` wrote say which of them show one picture.

    Args:
        path: `.txt` (a prompt a line), `.csv`, `.jsonl` or `.parquet`, with a column of prompts, a column `key` of
            samples (SHARD.tar/KEY), or both; a column `file` names pictures, relative to the list.
        column: that holds the prompts; None tries the usual names.
        label: column of which rows are taken that say memorized, canary, 1, true or yes.

    Raises:
        ValueError: in one line, the list cannot be read, has none of these columns, or nothing is left of it.
    """
    said = [name for name in (column, label) if name is not None]
    rows = read_rows(
        path, said, ("key", "file", "group", "sha256", "duplicate_of", _FLAGGED), key="forget", remedy=FORGET
    )
    names = list(dict.fromkeys(name for row in rows for name in row))
    for key, name in (("column", column), ("label", label)):
        if name is not None and name not in names:
            raise ValueError(f"forget.{key}={name}: {path} has no such column, but {', '.join(names[:12])}")
    caption = column or next((name for name in COLUMNS if name in names), None)
    if caption is None and not {"key", "file"} & {*names}:
        raise ValueError(f"forget={path} has no column {', '.join(COLUMNS)}, key or file; {FORGET}")
    if label is None and _FLAGGED in names:
        label = _FLAGGED
        if all(row.get(label) in (None, "") for row in rows):
            raise ValueError(
                f"forget={path}: its column {label} is empty, as detect had no threshold; say threshold= there, or "
                "make a list of the prompts that are to be forgotten"
            )
    if label is not None:
        rows = [row for row in rows if label_of(row.get(label)) in MEMORIZED]
    entries: dict[tuple, Entry] = {}
    for row in rows:
        said, sample, file = (_text(row.get(name)) for name in (caption, "key", "file"))
        if said is None and sample is None and file is None:
            continue
        picture = _text(row.get("group" if "sha256" in names else "duplicate_of"))
        if picture is None and "duplicate_of" in names:
            picture = sample  # the first of them
        folder = Path(path).expanduser().parent
        own = Entry(said, sample, None if file is None else folder / Path(file).expanduser(), picture)
        entries.setdefault((said, sample, file), own)
    if not entries:
        raise ValueError(f"forget={path}: nothing in it is to be forgotten (no row is flagged, labelled or filled)")
    return list(entries.values())


def _text(value: object) -> str | None:
    return None if value is None else str(of_cell(str(value))).strip() or None
