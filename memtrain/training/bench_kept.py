"""What a run keeps of every sample, by the option that has it kept: on a rank, and on a machine of several ranks."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from memtrain.core.evidence import LikelihoodEvidence, ZScoreEvidence
from memtrain.core.exclusion import ExclusionRule
from memtrain.data.batches import BatchDecoder
from memtrain.data.bench import linked_shards
from memtrain.data.datamodule import DataModule, from_shards
from memtrain.data.order import GlobalBatchSampler
from memtrain.data.samples import ShardSamples
from memtrain.training.machine import Keeper, Machine
from memtrain.training.score_memory import ScoreMemory, Scoring

_GROUP = 4  # duplicates of one picture
_ROWS = 1_000_000  # of a list, written at a time
_RULES: dict[str, Callable[[], ExclusionRule]] = {  # those that keep something of every sample
    "evidence": partial(LikelihoodEvidence, 0.05, 0.1, 0.9, 1.0, 2.0, 20.0, 10, 2000, 2000, 4, 2.0, 0.0, True, 20),
    "z_scores": partial(ZScoreEvidence, 3.0, 1.5, 0.9, 0.7, 10, 2000, 20),
}
OPTIONS = (
    "shards",
    "data.where",
    "data.exclude_keys",
    "data.repeats_from",
    "data.max_visits_per_group",
    "exclusion=evidence",
    "exclusion=z_scores",
    "score.every_visits",
)
NOTHING = "imports alone"


@dataclass(frozen=True)
class Kept:
    """What one option costs, bytes beyond what a rank holds that has imported all and opened nothing.

    Args:
        own: of one rank, which no other one has.
        together: of all ranks, what they share counted once.
        first_peak: the most that a process held that was the first to open it, when nothing was in the cache folder.
    """

    option: str
    own: int
    together: int
    first_peak: int


@dataclass(frozen=True)
class KeptBySample:
    """What each option has kept."""

    samples: int
    ranks: int
    share: float
    rows: list[Kept]


def measure_kept(
    shards: int,
    samples_per_shard: int,
    ranks: int,
    share: float,
    folder: Path,
    only: Sequence[str] = (),
    said: Callable[[str], None] = lambda what: None,
) -> KeptBySample:
    """Open a corpus for training with each option, in as many processes as a machine has ranks, and look at them.

    Args:
        share: of the samples that are on the list of excluded ones, and that are duplicates.
        folder: an empty folder on a disk with 60 kB free a shard.
        only: some of `OPTIONS`; empty: all.
        said: is told what is being measured.

    Raises:
        ValueError: a number is out of range, or the system does not say what its processes hold.
    """
    for name, value in (("--shards", shards), ("--samples", samples_per_shard), ("--ranks", ranks)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not 0 < share < 1:
        raise ValueError(f"--share must be in (0, 1), got {share:g}")
    if not Path("/proc/self/smaps_rollup").exists():
        raise ValueError("bench kept asks Linux what its processes hold; run it there")
    unknown = sorted(set(only) - set(OPTIONS))
    if unknown:
        raise ValueError(f"--only has {unknown[0]}; it takes {', '.join(OPTIONS)}")
    corpus = folder / "shards"
    corpus.mkdir()
    said("writing shards and lists")
    linked_shards(shards, samples_per_shard, corpus)
    excluded, groups = folder / "excluded.parquet", folder / "groups.parquet"
    total, listed = shards * samples_per_shard, max(_GROUP, int(share * shards * samples_per_shard))
    _write_names(excluded, total, listed, samples_per_shard)
    _write_names(groups, total, listed, samples_per_shard)
    data: dict[str, dict[str, Any]] = {
        "shards": {},
        "data.where": dict(where="width >= 100"),
        "data.exclude_keys": dict(exclude_keys=str(excluded)),
        "data.repeats_from": dict(repeats_from=str(groups)),
        "data.max_visits_per_group": dict(repeats_from=str(groups), max_visits_per_group=1),
    }
    work: dict[str, Callable[[Machine], object]] = {NOTHING: lambda machine: None}
    work |= {name: partial(_opened, corpus, folder, options) for name, options in data.items()}
    work |= {f"exclusion={name}": partial(_rule, make, total) for name, make in _RULES.items()}
    work["score.every_visits"] = partial(_memory, total)
    rows = []
    assert list(work) == [NOTHING, *OPTIONS]
    for name in [NOTHING, *(only or OPTIONS)]:
        said(name)
        hold = work[name]
        [(_, _, peak)] = _in_ranks(1, folder / f"{name}-first", hold)
        of_ranks = _in_ranks(ranks, folder / f"{name}-all", hold)
        rows.append(Kept(name, max(own for own, _, _ in of_ranks), sum(part for _, part, _ in of_ranks), peak))
    bare = rows[0]
    beyond = [
        Kept(row.option, row.own - bare.own, row.together - bare.together, row.first_peak - bare.first_peak)
        for row in rows[1:]
    ]
    return KeptBySample(total, ranks, share, beyond)


def _rule(make: Callable[[], ExclusionRule], num_samples: int, machine: Machine) -> Keeper:
    rule = make()
    rule.zeros = machine.zeros  # type: ignore[method-assign]
    rule.setup(num_samples, 1000)
    return _touched(rule)


def _memory(num_samples: int, machine: Machine) -> Keeper:
    return _touched(ScoreMemory(num_samples, Scoring(every_visits=4), machine.zeros))


def _touched(keeper: Keeper) -> Keeper:
    """A keeper of which all has been read and written, as it is in the end."""
    for name in keeper.per_sample:
        getattr(keeper, name).view(torch.uint8).add_(0)
    return keeper


def _opened(corpus: Path, folder: Path, options: dict[str, Any], machine: Machine) -> tuple[DataModule, list]:
    """A corpus from which the first batch has come, and of which all has been read that is kept of its samples."""
    repeats = {} if "repeats_from" in options else {"repeats": 100}
    settings = dict(duplicates="none", cache_dir=str(folder / "cache"), seed=0, canaries=2, reference=4)
    data = from_shards(str(corpus), 64, 8, 0, **{"repeats": None, **repeats, **settings, **options})
    batches = iter(GlobalBatchSampler(data.order, 8, 1, 0, 1, num_steps=1))
    BatchDecoder(data.samples, data.groups, data.views)(next(batches))
    pictures, limited = data.groups.pictures, data.order.limited
    for values in (pictures.positions, pictures.first, *pictures.sizes_of_groups, *vars(limited).values()):
        values.sum()
    assert isinstance(data.samples, ShardSamples)
    for rows in data.samples.rows.excluded.values():
        rows.sum()
    return data, [batches]


def _in_ranks(ranks: int, rendezvous: Path, hold: Callable[[Machine], object]) -> list[tuple[int, int, int]]:
    """See `_held`, of each of so many forks of this process."""
    fork = multiprocessing.get_context("fork")
    gc.collect()
    gc.freeze()
    pipes = [fork.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        fork.Process(target=_rank, args=(rank, ranks, rendezvous, hold, send), daemon=True)
        for rank, (_, send) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, send in pipes:
        send.close()
    try:
        found = [receive.recv() for receive, _ in pipes]
    except EOFError:
        raise ValueError("a rank of the benchmark ended early; is there memory for --ranks of them?") from None
    finally:
        for process in processes:
            process.join()
    return found


def _rank(rank: int, ranks: int, rendezvous: Path, hold: Callable[[Machine], object], send: Connection) -> None:
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    held = hold(Machine(rank, ranks))
    gc.collect()
    torch.distributed.barrier()  # here: all hold it
    send.send(_held())
    torch.distributed.barrier()  # and let go of it when all have been looked at
    del held
    torch.distributed.destroy_process_group()


def _held() -> tuple[int, int, int]:
    """Bytes that this process holds alone, its part of all that processes hold together, and the most it ever held."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Pss"], peak


def _write_names(path: Path, total: int, count: int, samples_per_shard: int) -> None:
    """A list of `count` samples, evenly spread, in groups of `_GROUP` that lie far apart."""
    columns = [("group", pa.int64()), ("key", pa.string())]
    groups = max(1, count // _GROUP)
    with pq.ParquetWriter(path, pa.schema(columns), compression="zstd") as writer:
        for first in range(0, groups * _GROUP, _ROWS):
            row = np.arange(first, min(first + _ROWS, groups * _GROUP))
            position = (row % groups + row // groups * groups) * (total // (groups * _GROUP))
            shard, number = np.divmod(position, samples_per_shard)
            parts = [_padded(shard, 5), _padded(number, 9)]
            keys = pc.binary_join_element_wise(*parts, ".tar/")
            writer.write_table(pa.table([pa.array(row % groups), keys], names=["group", "key"]))


def _padded(numbers: np.ndarray, digits: int) -> pa.Array:
    return pc.utf8_lpad(pa.array(numbers).cast(pa.string()), digits, "0")
