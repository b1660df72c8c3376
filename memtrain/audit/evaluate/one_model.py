"""One finished model on chosen training samples: what it copies, and what it can still do.

Shapes: N training samples, G generations of each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from memtrain.audit.evaluate.fid import Distances
from memtrain.audit.evaluate.judging import judge, note_nearest, summarise
from memtrain.audit.evaluate.looks import (
    Advance,
    Look,
    Looker,
    OfPictures,
    OfReal,
    OfSamples,
    SeenGenerations,
    SeenPictures,
    nearest_of,
)
from memtrain.audit.evaluate.results import Found, Match, ModelResult
from memtrain.audit.evaluate.settings import REFERENCE_GROUP
from memtrain.audit.training_pictures import TrainingPictures
from memtrain.audit.training_samples import draw_positions, read_pictures
from memtrain.core.streams import Stream, place_seed
from memtrain.data.distribute import Distributor, Local, in_order
from memtrain.data.images import BadSample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lookers:
    """Who looks at samples and pictures; without `load` it is this process.

    Args:
        distributor: who.
        load: what gives another process its `Looker`; a function of a module.
    """

    distributor: Distributor = field(default_factory=Local)
    load: Callable[[], Looker] | None = None


class Evaluation:
    """One model, the samples it is judged on, and how: what `looker` has of them. Lookers share the work."""

    def __init__(self, looker: Looker, lookers: Lookers, batch_size: int, advance: Advance):
        self.lookers, self.batch_size, self.advance = lookers, batch_size, advance
        self.looker = looker
        self.samples, self.chosen = looker.samples, looker.chosen
        self.measures, self.settings = looker.measures, looker.settings
        self.pictures = TrainingPictures(
            looker.samples, looker.chosen.never_trained_on(), looker.settings.nearest, looker.chosen.positions,
            looker.settings.seed,
        )  # fmt: skip
        self.distances = Distances()

    def run(self, name: str, source: str, identity: str) -> Found:
        # a look has as many samples as a batch has rows: whole batches, the same whoever looks
        of_samples: list[Look] = [OfSamples(rows) for rows in _ranges(len(self.chosen), self.batch_size)]
        of_pictures: list[Look] = [OfPictures(some) for some in self.pictures.some_at_a_time()]
        readable = self._readable()
        of_real: list[Look] = [
            OfReal(readable[rows.start : rows.stop]) for rows in _ranges(len(readable), self.batch_size)
        ]
        seen = self._seen([*of_samples, *of_pictures, *of_real])
        rows, features, nearest = self._generations([next(seen) for _ in of_samples])
        searched = self._search(rows, features, islice(seen, len(of_pictures)))
        never_seen = [row["group"] == REFERENCE_GROUP for row in rows]
        cut, reach = judge(rows, never_seen, self.measures.similarity, self.settings.false_copies)
        for found in seen:
            self.distances.add(found, real=True)
            self.advance("shards' pictures", self.distances.counts[True], len(readable))
        similarity = self.measures.similarity
        per_sample = self.settings.num_images_per_prompt
        groups = [summarise(rows, group, per_sample, similarity) for group in dict.fromkeys(self.chosen.groups)]
        result = ModelResult(
            model=name,
            source=source,
            measure=similarity.name,
            copy_rule=similarity.rule(similarity.in_own_terms(cut.distance)),
            cut=similarity.in_own_terms(cut.distance),
            cut_is=cut.why,
            searched=searched,
            groups=groups,
            heldout_loss=next((g.denoising_loss for g in groups if g.group == REFERENCE_GROUP), None),
            frechet_name=self.measures.features.name,
            frechet_distance=self.distances.frechet(),
            kernel_distance=self.distances.kernel(),
            frechet_generated=self.distances.counts[False],
            frechet_real=self.distances.counts[True],
            identity=identity,
            attack=str(self.settings.attack),
            attack_reach=None if reach is None else similarity.in_own_terms(reach),
        )
        return Found(result, pa.Table.from_pylist(rows), self._pairs(rows, nearest))

    def _seen(self, looks: list[Look]) -> Iterator[Any]:
        """What each look found, in their order."""
        load = self.lookers.load or (lambda: self.looker)
        return in_order(self.lookers.distributor.run(Looker.look, looks, load, str), lambda place: str(looks[place]))

    def _generations(
        self, found: list[list[SeenGenerations]]
    ) -> tuple[list[dict], Tensor, list[tuple[int, np.ndarray]]]:
        """A row a generation, those under attack last, what they are compared by (Q, …), and (row, pixels) of those
        nearest to their own."""
        rows: list[dict] = []
        features: list[Tensor] = []
        pairs: list[tuple[int, np.ndarray]] = []
        for kind in zip(*found, strict=True):  # here: from captions, of all looks; then those under attack
            nearest: list[tuple[float, int, np.ndarray]] = []
            for part in kind:
                moved = [(distance, len(rows) + row, image) for distance, row, image in part.nearest]
                nearest = nearest_of([*nearest, *moved], self.settings.gallery)
                rows += part.rows
                features.append(part.compared)
                for judged in part.judged:
                    self.distances.add(judged, real=False)
            pairs += [(row, image) for _, row, image in nearest]
        return rows, torch.cat(features), pairs

    def _search(self, rows: list[dict], features: Tensor, seen: Iterator[SeenPictures]) -> int:
        """Say in each row which training picture is the nearest, and how near; how many could be searched."""
        read: list[int] = []

        def blocks() -> Iterator[Tensor]:
            for pictures in seen:
                read.extend(pictures.positions)
                self.advance("nearest training pictures", len(read), len(self.pictures))
                if pictures.features is not None:
                    yield pictures.features

        note_nearest(rows, features, self.measures.similarity, blocks(), lambda place: self.samples.key(read[place]))
        return len(read)

    def _readable(self) -> list[int]:
        """As many pictures of the shards as are wanted, drawn by seed; what cannot be read is left out."""
        seed, readable = place_seed(self.settings.seed, Stream.REAL, 0, 0), []
        for position in draw_positions(self.samples, self.settings.fid_samples, seed):
            try:
                self.samples.get(position)
                readable.append(position)
            except BadSample as problem:
                log.warning("left out %s: %s", self.samples.key(position), problem)
        return readable

    def _pairs(self, rows: list[dict], nearest: list[tuple[int, np.ndarray]]) -> list[Match]:
        similarity, pairs, size = self.measures.similarity, [], self.looker.denoiser.model.own_size
        nearest = sorted(nearest, key=lambda entry: -similarity.nearness(rows[entry[0]][similarity.column]))
        for number, image in nearest:
            row, sample = rows[number], number // self.settings.num_images_per_prompt % len(self.chosen)
            pairs.append(
                Match(
                    caption=row["caption"],
                    key=row["key"],
                    group=row["group"],
                    generated=image,
                    original=read_pictures(self.samples, [self.chosen.positions[sample]], size)[0],
                    said=f"{similarity.name} {row[similarity.column]:.3f}",
                    is_copy=row["is_copy"],
                    attacked=row["attacked"],
                )
            )
        return pairs


def _ranges(total: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, total)) for first in range(0, total, size))
