"""`shards check` and `shards duplicates` as functions, in this process or in two others."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from memtrain.data.check import DECODED, TRUSTED, check_shards
from memtrain.data.check_report import CorpusReport, report_check
from memtrain.data.distribute import Local, Part
from memtrain.data.duplicate_groups import group_duplicates
from memtrain.data.duplicates import Duplicates, hash_shards
from memtrain.data.partials import open_manifest
from memtrain.data.sources import LocalShard, local_shards

MEMORY = 500_000_000


def check_all(shards: Sequence[LocalShard], decode: bool = True, workers: int = 1) -> CorpusReport:
    """Faults are read before the folder is gone."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = open_manifest(Path(folder), "check", DECODED if decode else TRUSTED, shards)
        assert not [done for done in check_shards(manifest, Part(), Local(workers)) if done.failure]
        report = report_check(manifest, Path(folder), MEMORY, 1)
        faults = report.faults
    return _Read(report.shards, report.decoded, report.lost, report.file, kept=faults)


class _Read(CorpusReport):
    def __init__(self, *args, kept):
        super().__init__(*args)
        object.__setattr__(self, "kept", kept)

    def iter_faults(self):
        return iter(self.kept)


def duplicates_in(*folders: Path, distance: int = 31, workers: int = 1) -> tuple[Duplicates, pa.Table]:
    """What was found, and its table."""
    with tempfile.TemporaryDirectory() as made:
        manifest = open_manifest(Path(made), "duplicates", "", local_shards([str(folder) for folder in folders]))
        assert not [done for done in hash_shards(manifest, Part(), Local(workers)) if done.failure]
        found = group_duplicates(
            manifest, Path(made) / "groups.parquet", distance, MEMORY, 1, Local(workers), MEMORY, lambda items, _: items
        )
        return found, pq.read_table(found.file)
