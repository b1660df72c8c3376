"""A long list in parts: each written aside, renamed when whole, and found again after a stop."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.core.files import written_aside
from memtrain.data.distribute import Part
from memtrain.data.kept import alone, one_at_a_time

log = logging.getLogger(__name__)


class Parts:
    """Tables with a column `position`, kept in `folder`/parts until all positions are there.

    Args:
        folder: made where it is missing.
        made_with: what the rows depend on; JSON values. Kept in `folder`/settings.json.
        overwrite: throw away rows that were made with something else, and say so.

    Raises:
        ValueError: `folder` holds rows that were made with something else, and `overwrite` is off.
    """

    def __init__(self, folder: Path, made_with: dict, overwrite: bool):
        self.folder, self.parts = folder, folder / "parts"
        self.finished = folder / "scores.parquet"
        with one_at_a_time(self.parts, ["settings.json"]):  # parts of one list may start together
            self._begin(folder / "settings.json", made_with, overwrite)

    def _begin(self, settings: Path, made_with: dict, overwrite: bool) -> None:
        if settings.is_file():
            different = _differences(settings, made_with)
            if different and not overwrite:
                raise ValueError(
                    f"out={self.folder} holds scores of another run ({', '.join(different)} differ); "
                    "name another folder, or say overwrite=true to do it anew"
                )
            if different:
                log.warning("%s: the scores there are thrown away: %s differ", self.folder, ", ".join(different))
                self._clear()
        else:
            self._clear()  # parts without settings cannot be trusted
        self.parts.mkdir(parents=True, exist_ok=True)
        with written_aside(settings) as aside:
            aside.write_text(json.dumps(made_with, indent=2), encoding="utf-8")

    def _clear(self) -> None:
        shutil.rmtree(self.parts, ignore_errors=True)
        self.finished.unlink(missing_ok=True)

    def alone(self, part: Part) -> AbstractContextManager[None]:
        """While one process does this part, no other can. Raises ValueError where one does."""
        file = self.parts / f".{part.number}-{part.count}.lock"
        return alone(file, f"wait for it, or name another out=FOLDER (part={part})")

    def read(self) -> list[pa.Table]:
        """What is there, of all parts; a damaged file is left out, said and its rows done anew."""
        tables = []
        for path in [self.finished] if self.finished.is_file() else sorted(self.parts.glob("[!.]*.parquet")):
            try:
                tables.append(pq.read_table(path))
            except (pa.ArrowInvalid, OSError) as error:
                log.warning("%s is damaged (%s); its prompts are scored again", path, str(error).splitlines()[0])
                path.unlink()
        return tables

    def add(self, table: pa.Table) -> None:
        first, last = table["position"][0].as_py(), table["position"][-1].as_py()
        write_table(self.parts / f"{first:09d}-{last:09d}.parquet", table)

    def finish(self, table: pa.Table) -> None:
        """All rows: one file, and the parts are gone."""
        write_table(self.finished, table)
        shutil.rmtree(self.parts, ignore_errors=True)


def _differences(settings: Path, made_with: dict) -> list[str]:
    try:
        before = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError:
        return ["settings.json"]
    now = json.loads(json.dumps(made_with))  # tuples as lists
    return [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]


def write_table(path: Path, table: pa.Table) -> None:
    with written_aside(path) as aside:
        pq.write_table(table, aside, compression="zstd")
