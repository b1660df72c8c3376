"""`copies.csv`: a run's last generations, a row each, with how near they came to training pictures."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from memtrain.data.escaping import as_cell, of_cell


@dataclass(frozen=True)
class CopyRow:
    """A generation, and what it was held against. Texts are as untrusted as the corpus."""

    group: str  # canary, sacrificed or reference
    canary: int | None  # its number; None: a reference caption
    kind: str  # of canary
    repeats: int  # of the canary, an epoch; 0: never trained on
    key: str  # of the sample whose caption it is from
    caption: str
    generation: int
    rmse: float  # to that sample's picture
    nearest_rmse: float  # to the nearest training picture, inf: there is none
    nearest_key: str  # its key
    is_copy: bool  # of its own picture


def write_copies(path: Path, rows: Iterable[CopyRow]) -> None:
    """Write the rows; what a spreadsheet would take for a formula is guarded."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([field.name for field in fields(CopyRow)])
        for row in rows:
            writer.writerow([as_cell(int(cell) if isinstance(cell, bool) else cell) for cell in astuple(row)])


def read_copies(path: Path) -> list[CopyRow]:
    """The rows of a `copies.csv`. Raises ValueError where it is none."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return [_read(row) for row in csv.DictReader(stream)]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no copies.csv of a run ({type(error).__name__}: {error})") from error


def _read(row: dict[str, str]) -> CopyRow:
    return CopyRow(
        group=str(of_cell(row["group"])),
        canary=int(row["canary"]) if row["canary"] else None,
        kind=str(of_cell(row["kind"])),
        repeats=int(row["repeats"]),
        key=str(of_cell(row["key"])),
        caption=str(of_cell(row["caption"])),
        generation=int(row["generation"]),
        rmse=float(row["rmse"]),
        nearest_rmse=float(row["nearest_rmse"]),
        nearest_key=str(of_cell(row["nearest_key"])),
        is_copy=row["is_copy"] == "1",
    )
