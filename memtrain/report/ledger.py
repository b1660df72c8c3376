"""What a run's ledger says of its samples: who looks memorized, who was excluded, and what they scored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from memtrain.audit.suspects import Judged, judge
from memtrain.core.exclusion import GROUP_NAMES, TRAINED
from memtrain.data.ledger import batches, read_about, read_ledger
from memtrain.data.paths import LEDGER

BINS = 10  # timestep bins
FALSE_POSITIVE_RATE = 0.01
_POINTS = 900  # of each group in the scatter
_LISTED = 18  # pictures that were excluded most often


@dataclass(frozen=True)
class Points:
    """Some visits of one group, for the scatter, and its median score in each timestep bin."""

    timesteps: np.ndarray  # (P,)
    scores: np.ndarray  # (P,)
    median: np.ndarray  # (BINS,), nan where a bin is empty


@dataclass(frozen=True)
class LedgerView:
    """What the report shows of a ledger."""

    rows: int
    num_timesteps: int
    judged: Judged | None  # None without scores that count
    excluded: list[dict]  # key, group, samples, visits, excluded (visits) of the pictures that were excluded most often
    points: dict[str, Points]
    threshold: np.ndarray | None  # (BINS,) median; None where it is not held against the score itself
    reference_high: np.ndarray  # (BINS,) the reference set's 1 - FALSE_POSITIVE_RATE quantile of scores
    remarks: list[str] = field(default_factory=list)

    @property
    def false_positive_rate(self) -> float:
        """The share that looks memorized of samples that are not: 1 %, or the least that can be told."""
        return max(FALSE_POSITIVE_RATE, 1 / (self.judged.compared_with + 1))

    def of(self, *groups: str) -> pa.Table:
        """The judged pictures of these groups, the most memorized first."""
        return self.judged.table.filter(pc.is_in(self.judged.table["group"], pa.array(groups)))

    def memorized(self, *groups: str) -> pa.Table | None:
        """The pictures of these groups that look memorized; None where there is no reference set to tell from."""
        if self.judged is None or not self.judged.has_reference:
            return None
        return self.of(*groups).filter(pc.field("p_value") <= self.false_positive_rate)


def view_ledger(folder: Path) -> LedgerView | None:
    """What a run's ledger says; None where the run has none, or none yet."""
    if not any((folder / LEDGER).glob("rank*.parquet")):
        return None
    dataset, about = read_ledger(folder), read_about(folder)
    remarks: list[str] = []
    if about.sample < 1:
        share = f"{about.sample:.3g} of all visits"
        remarks.append(f"The ledger holds {share}, drawn at random; counts are of those.")
    try:
        judged = judge(folder)
    except ValueError as error:  # nothing was scored where it counts
        judged = None
        why = str(error).removeprefix(f"{folder}: ")
        remarks.append(f"Which samples look memorized is not known: {why}.")
    if judged is not None and not judged.has_reference:
        remarks.append(
            "No reference set was scored, so there is nothing to tell memorized samples from; they are ranked "
            "against one another (reference.count=200 reference.batch_size=16 holds some out and scores them)."
        )
    drawn = _draw(dataset, dataset.count_rows())
    points = {group: _points(rows, about.num_timesteps) for group, rows in drawn.items() if len(rows)}
    rows = np.concatenate([np.zeros((0, 4)), *drawn.values()])
    threshold = _threshold(rows, about.num_timesteps)
    if threshold is None and np.isfinite(rows[:, 2]).any():
        remarks.append(
            "The rule's threshold is not held against a single score, so it is not drawn over the scores; "
            "the reference set's 99 % quantile is."
        )
    reference = drawn.get("reference", np.zeros((0, 4)))
    return LedgerView(
        rows=dataset.count_rows(),
        num_timesteps=about.num_timesteps,
        judged=judged,
        excluded=_most_excluded(dataset),
        points=points,
        threshold=threshold,
        reference_high=_by_bin(reference[:, :2], about.num_timesteps, 1 - FALSE_POSITIVE_RATE),
        remarks=remarks,
    )


def _draw(dataset: ds.Dataset, count: int) -> dict[str, np.ndarray]:
    """Timestep, score, threshold and kept of some scored visits of each group. (V, 4)

    Small groups whole, of large ones about 200,000: quantiles need more rows than the scatter shows.
    """
    generator = np.random.default_rng(0)
    drawn: dict[str, list[np.ndarray]] = {}
    share = min(1.0, 2e5 / count)
    for batch in batches(dataset, ["group", "timestep", "score", "threshold", "kept"], pc.field("score") > 0):
        names = ("timestep", "score", "threshold", "kept")
        # four columns (V,) -> (V, 4)
        rows = np.stack([batch[n].to_numpy(zero_copy_only=False).astype(np.float64) for n in names], axis=1)
        group = pc.index_in(batch["group"], pa.array(GROUP_NAMES)).to_numpy(zero_copy_only=False)
        chance = np.where(group == TRAINED, share, min(1.0, 10 * share))
        taken = generator.random(len(rows)) < chance
        for number in np.unique(group):
            drawn.setdefault(GROUP_NAMES[number], []).append(rows[taken & (group == number)])
    return {name: np.concatenate(parts) for name, parts in drawn.items()}


def _points(rows: np.ndarray, num_timesteps: int) -> Points:
    """Some visits of a group, drawn from rows (V, 4) as `_draw` gives them, by timestep, and its medians."""
    shown = np.random.default_rng(1).permutation(len(rows))[:_POINTS]
    shown = shown[np.argsort(rows[shown, 0], kind="stable")]
    return Points(rows[shown, 0], rows[shown, 1], _by_bin(rows[:, :2], num_timesteps, 0.5))


def _by_bin(rows: np.ndarray, num_timesteps: int, quantile: float) -> np.ndarray:
    """A quantile of the second column in each bin of the first, timesteps. (BINS,)"""
    bins = (rows[:, 0] * BINS // num_timesteps).astype(np.int64)
    parts = [rows[bins == b, 1] for b in range(BINS)]
    return np.array([np.quantile(part, quantile) if len(part) else np.nan for part in parts])


def _threshold(rows: np.ndarray, num_timesteps: int) -> np.ndarray | None:
    """The median threshold of each timestep bin; None where the rule keeps by another test than `score < threshold`."""
    rows = rows[np.isfinite(rows[:, 2])]
    agrees = (rows[:, 1] < rows[:, 2]) == rows[:, 3].astype(bool)
    if len(rows) == 0 or agrees.mean() < 0.95:
        return None
    return _by_bin(rows[:, [0, 2]], num_timesteps, 0.5)


def _most_excluded(dataset: ds.Dataset) -> list[dict]:
    """The pictures that were excluded most often: key, group, excluded, visits and samples of each.

    Counted piece by piece; the pieces so far are summed whenever the new ones have grown as large as their sum.
    """
    parts: list[pa.Table] = []
    trained = ~pc.field("kept") & (pc.field("group") != "reference")
    picture = pc.coalesce(pc.field("duplicate_of"), pc.field("key"))  # the key of its first sample
    for batch in batches(dataset, {"key": picture, "group": pc.field("group")}, trained):
        ones = pa.array(np.ones(len(batch), dtype=np.int64))
        parts.append(pa.Table.from_batches([batch]).append_column("excluded", ones))
        if sum(map(len, parts[1:])) > max(2**17, len(parts[0])):
            parts = [_summed(parts)]
    if not parts:
        return []
    ranked = _summed(parts).sort_by([("excluded", "descending"), ("key", "ascending")])
    found = ranked.slice(0, _LISTED).to_pylist()
    # once more through the ledger, for all visits of these pictures and the samples that show them
    keys = pa.array([row["key"] for row in found], pa.string())
    visits: Counter[str] = Counter()
    samples: dict[str, set[str]] = {row["key"]: set() for row in found}
    for batch in batches(dataset, {"picture": picture, "key": pc.field("key")}, picture.isin(keys)):
        of = batch["picture"].to_pylist()
        visits.update(of)
        for shown, key in zip(of, batch["key"].to_pylist(), strict=True):
            samples[shown].add(key)
    return [row | {"visits": visits[row["key"]], "samples": len(samples[row["key"]])} for row in found]


def _summed(parts: list[pa.Table]) -> pa.Table:
    """One row for each key and group of the parts, with the sum of what was excluded."""
    table = pa.concat_tables(parts).group_by(["key", "group"]).aggregate([("excluded", "sum")])
    return table.rename_columns(["key", "group", "excluded"])
