"""Which pictures look memorized, judged from a run's ledger after the fact.

The evidence against a picture is that of `core.visits`, over all visits of all its samples; the p-value is its rank
among the reference set's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from memtrain.core.exclusion import GROUP_NAMES, REFERENCE, TRAINED
from memtrain.core.visits import COUNTED_FROM, columns_of, evidence, log_ratio, sums_of
from memtrain.data.escaping import as_text
from memtrain.data.find_pictures import find_pictures, read_pictures_from
from memtrain.data.foreign import KEY as FOREIGN_KEY
from memtrain.data.ledger import KeyNumbers, batches, read_about, read_ledger
from memtrain.data.samples import ShardSamples
from memtrain.data.sources import find_sources

NUM_BINS = 10  # of timesteps, over the whole schedule
_PERIOD_ROWS = 50  # rows to compare with that each bin of a period has, on average
_MAX_PERIODS = 50


@dataclass(frozen=True)
class Judged:
    """What a ledger says of its pictures; samples that are duplicates of one another are one."""

    # key (of the first sample), samples (that the ledger names), group, visits, counted_visits, evidence, p_value,
    # mean_score, excluded_share; a row a picture, worst first
    table: pa.Table
    keys: pa.Table  # key, duplicate_of (a key of `table`): the other samples of pictures that have several
    rows: int  # in the ledger
    steps: int  # from the first to the last in it
    sample: float  # share of the rows that the ledger holds
    compared_with: int  # pictures whose own evidence gives the p-values
    has_reference: bool  # False: the run scored no reference set, pictures were compared with one another

    def suspects(self, false_positive_rate: float) -> pa.Table:
        """The rows of pictures that look memorized; of others, this share is expected among them.

        Raises:
            ValueError: the rate is no share, or the reference set is too small to tell it.
        """
        if not 0 < false_positive_rate < 1:
            raise ValueError(f"--false-positive-rate is a share between 0 and 1, got {false_positive_rate:g}")
        finest = 1 / (self.compared_with + 1)
        if false_positive_rate < finest:
            raise ValueError(
                f"{self.compared_with} samples to compare with cannot tell a false-positive rate of "
                f"{false_positive_rate:g}; ask for at least {finest:.2g}, or raise reference.count or steps"
            )
        return self.table.filter(pc.field("p_value") <= false_positive_rate)

    def every_sample(self, pictures: pa.Table, unvisited: pa.Table | None = None) -> pa.Table:
        """A row a sample of these pictures, so that a list of keys leaves out all of them: rows of one are alike.

        The first column is the sample's own key; `duplicate_of` names the first sample, null where it is that one.

        Args:
            unvisited: key, duplicate_of of samples that the ledger need not name, see `duplicates_in_corpus`.
        """
        foreign = pc.match_substring_regex(pictures["key"], f"^{FOREIGN_KEY.pattern}$")
        pictures = pictures.filter(pc.invert(foreign))  # nobody can leave out what is in no shard
        keys = self.keys
        if unvisited is not None:
            keys = pa.concat_tables([keys, unvisited]).group_by(["key", "duplicate_of"]).aggregate([])
        place = pc.index_in(keys["duplicate_of"], pictures["key"].combine_chunks())
        others = keys.append_column("place", place).filter(pc.is_valid(place))
        first = pa.table({"key": pictures["key"], "place": pa.array(np.arange(len(pictures)), pa.int32())})
        first = first.add_column(1, "duplicate_of", pa.nulls(len(pictures), pa.string()))
        listed = pa.concat_tables([first, others]).sort_by([("place", "ascending"), ("key", "ascending")])
        alike = pictures.drop_columns(["key"]).take(listed["place"])
        columns = {name: alike[name] for name in alike.column_names}
        return pa.table({"key": listed["key"], "duplicate_of": listed["duplicate_of"], **columns})


def judge(run: str | Path, score: str | None = None) -> Judged:
    """Evidence against every picture of a run that was scored, by magnitude at high noise.

    Args:
        score: by which of the scores that the run took; None: by the one that its rule went by.

    Raises:
        ValueError: there is no ledger, or no such score in it that counts.
    """
    about = read_about(run)
    visits = _read(run, "score" if score is None else about.column(score))
    keys, picture, scored = visits.keys, visits.picture, np.isfinite(visits.score)
    group = np.zeros(len(keys), dtype=np.int64)  # of each picture
    group[picture] = visits.group

    counted = scored & (visits.timestep >= COUNTED_FROM[score or about.score] * about.num_timesteps)
    has_reference = bool((group[picture[counted]] == REFERENCE).any())
    compared = group == (REFERENCE if has_reference else TRAINED)
    if not (counted & compared[picture]).any():
        raise ValueError(f"{run}: the ledger has no scores that count to compare with; train longer")
    counted_visits, found = _evidence(visits, counted, compared, about.num_timesteps)
    judged = counted_visits > 0
    if not (judged & compared).any():
        raise ValueError(f"{run}: too few scores that count to compare with; train longer")
    null = np.sort(found[judged & compared])
    above = len(null) - np.searchsorted(null, found, side="left")
    named = judged & (group != REFERENCE)
    # a picture that is itself compared with has itself in the count
    p_value = np.where(compared, above / len(null), (above + 1) / (len(null) + 1))

    others = visits.others.sort_by("key")
    sizes = 1 + np.bincount(pc.index_in(others["duplicate_of"], keys).to_numpy(), minlength=len(keys))
    all_visits = np.bincount(picture, minlength=len(keys))
    all_scored = np.bincount(picture[scored], minlength=len(keys))
    order = np.flatnonzero(named)[np.argsort(-found[named], kind="stable")]
    total = np.bincount(picture[scored], visits.score[scored], minlength=len(keys))
    shown = {
        "key": keys.take(pa.array(order)),
        "samples": sizes[order],
        "group": pa.array(GROUP_NAMES).take(pa.array(group[order])),
        "visits": all_visits[order],
        "counted_visits": counted_visits[order],
        "evidence": found[order],
        "p_value": p_value[order],
        "mean_score": total[order] / all_scored[order],
        "excluded_share": np.bincount(picture, ~visits.kept, minlength=len(keys))[order] / all_visits[order],
    }
    return Judged(
        pa.table(shown),
        keys=others,
        rows=len(picture),
        steps=visits.steps,
        sample=about.sample,
        compared_with=len(null),
        has_reference=has_reference,
    )


@dataclass(frozen=True)
class _Visits:
    """All rows of a ledger, at 20 bytes a row; pictures are numbered in the order in which they come."""

    keys: pa.Array  # of each picture's first sample
    others: pa.Table  # key, duplicate_of: the other samples
    picture: np.ndarray  # (N,) int32, number
    group: np.ndarray  # (N,) int8
    step: np.ndarray  # (N,) int32
    timestep: np.ndarray  # (N,) int16
    score: np.ndarray  # (N,) float32, NaN where it was not taken
    loss: np.ndarray  # (N,) float32
    kept: np.ndarray  # (N,) bool

    @property
    def steps(self) -> int:
        """From the first to the last."""
        return int(self.step.max() - self.step.min()) + 1


def _read(run: str | Path, score: str) -> _Visits:
    """Piece by piece, with the score of this column.

    A key and a group as text take more than all else, and are needed once a picture.
    """
    ledger = read_ledger(run)
    numbers = KeyNumbers()
    kinds = {"picture": np.int32, "group": np.int8, "step": np.int32, "timestep": np.int16}
    kinds |= {"score": np.float32, "loss": np.float32, "kept": bool}
    column = {name: np.empty(ledger.count_rows(), kind) for name, kind in kinds.items()}
    pair = pa.schema([("key", pa.string()), ("duplicate_of", pa.string())])
    others, first = pair.empty_table(), 0
    names = ["step", "key", "duplicate_of", "group", "timestep", "loss", "kept"]
    for batch in batches(ledger, {name: pc.field(name) for name in names} | {"score": pc.field(score)}):
        rows = slice(first, first := first + len(batch))
        column["picture"][rows] = numbers.of(pc.coalesce(batch["duplicate_of"], batch["key"]))
        column["group"][rows] = pc.index_in(batch["group"], pa.array(GROUP_NAMES)).to_numpy()
        for name in ("step", "timestep", "score", "loss", "kept"):
            column[name][rows] = batch[name].to_numpy(zero_copy_only=False)
        copies = pa.Table.from_batches([batch]).select(pair.names).filter(pc.is_valid(batch["duplicate_of"]))
        if len(copies):
            others = pa.concat_tables([others, copies.cast(pair)]).group_by(pair.names).aggregate([])
    return _Visits(numbers.keys, others, **column)


def _evidence(
    visits: _Visits, counted: np.ndarray, compared: np.ndarray, num_timesteps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Visits that count and evidence of each picture, from the rows `counted` (N,) bool. (pictures,), (pictures,)"""
    of, step = visits.picture[counted], visits.step[counted]
    x = log_ratio(torch.tensor(visits.score[counted]), torch.tensor(visits.loss[counted])).numpy()
    bins = visits.timestep[counted].astype(np.int32) * NUM_BINS // num_timesteps
    cells = _periods(step, compared[of], len(np.unique(bins))).astype(np.int32) * NUM_BINS + bins
    z, counts = z_scores(x, of, cells, compared)
    of, z = of[counts], z[counts]
    time = (step[counts] - visits.step.min() + 1) / visits.steps  # (0, 1] of the run
    del x, bins, cells, step, counts  # they are as large as what follows
    number = np.bincount(of, minlength=len(compared))
    sums = sums_of(columns_of(torch.tensor(z), torch.tensor(time)), torch.tensor(of, dtype=torch.int64), len(compared))
    return number, evidence(sums, torch.tensor((number > 0) & compared)).numpy()


def duplicates_in_corpus(data: Mapping[str, Any], keys: Sequence[str]) -> pa.Table:
    """The other samples of the pictures that these samples show: those, too, that a run has not come to yet.

    Args:
        data: `data` of the run's config.
        keys: of the first samples of pictures.

    Returns:
        key, duplicate_of.

    Raises:
        ValueError, OSError, ShardMissing: the shards cannot be opened, or would have to be fetched.
    """
    if any(shard.is_remote for shard in find_sources(data["shards"])):
        raise ValueError("the shards are remote, and nothing is fetched")
    taken = ("resolution", "caption", "where", "cache_dir", "max_aspect_ratio", "bucket_multiple", "exclude_keys")
    samples = ShardSamples(
        data["shards"], missing_shards="skip", **{name: data[name] for name in taken if name in data}
    )
    if data.get("repeats_from"):
        pictures = read_pictures_from(data["repeats_from"], samples)
    else:
        pictures = find_pictures(samples, data.get("duplicates", "near"), workers=1)
    positions = samples.look_up(keys)
    key_of = dict(zip(positions.tolist(), keys, strict=True))
    others = np.isin(pictures.first, positions[positions >= 0]) & (pictures.positions != pictures.first)
    columns = {
        "key": [as_text(samples.key(position)) for position in pictures.positions[others].tolist()],
        "duplicate_of": [key_of[first] for first in pictures.first[others].tolist()],
    }
    return pa.table(columns, pa.schema([("key", pa.string()), ("duplicate_of", pa.string())]))


def _periods(step: np.ndarray, compared: np.ndarray, num_bins: int) -> np.ndarray:
    """Which period of training each row falls into; they have as many rows to compare with. (N,) int64"""
    number = int(np.clip(compared.sum() // (num_bins * _PERIOD_ROWS), 1, _MAX_PERIODS))
    bounds = np.quantile(step[compared], np.arange(1, number) / number)
    return np.searchsorted(bounds, step, side="right")


def z_scores(
    log_score: np.ndarray, sample: np.ndarray, cells: np.ndarray, compared: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How far each row lies above its cell's rows of samples to compare with, its own sample's left out.

    Args:
        log_score, sample, cells: (N,) of each row; samples and cells are numbered from 0.
        compared: (samples,) bool, whose rows make a cell's mean and standard deviation.

    Returns:
        z (N,), and (N,) bool, whether three rows at least were there to compare with.
    """

    centred = log_score - log_score.mean()  # squares of small numbers lose nothing
    mine = compared[sample]
    held, cell = centred[mine], cells[mine]
    _, pair = np.unique(sample[mine].astype(np.int64) * (cells.max() + 1) + cell, return_inverse=True)

    def others(power: np.ndarray) -> np.ndarray:  # sums over the rows with equal cell, less those with equal pair too
        found = np.bincount(cell, power, minlength=cells.max() + 1)[cells]
        found[mine] -= np.bincount(pair, power)[pair]
        return found

    count = others(np.ones(len(held)))
    counts = count >= 3
    count = np.maximum(count, 3)
    mean = others(held) / count
    variance = others(held**2) / count
    variance -= mean**2
    variance = np.maximum(variance, 0, out=variance) * count / (count - 1)
    return (centred - mean) / np.sqrt(np.maximum(variance, 1e-12)), counts
