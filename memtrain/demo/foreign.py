"""Foreign pictures for sacrificed canaries: what the package brings, or a shard that the user names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from memtrain.core.streams import Stream, place_seed
from memtrain.data.batches import Samples
from memtrain.data.samples import ShardSamples
from memtrain.data.view import Seen, Sizes, View
from memtrain.demo.compose import Composites, distinct


class ForeignComposites:
    """`count` composites of packaged emoji, drawn by seed, as samples of any size. See `memtrain.data.batches.Samples`.

    None of them is in a demo corpus but by chance: these are drawn by another stream.
    """

    def __init__(self, seed: int, count: int, resolution: int):
        self.sizes = [(resolution, resolution)]
        self.composites = list(itertools.islice(distinct(Composites(place_seed(seed, Stream.FOREIGN, 0, 0))), count))

    @property
    def counts(self) -> list[int]:
        return [len(self.composites)]

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Nothing is to be fetched."""

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Nothing is to be read."""

    def key(self, index: int) -> str:
        return f"composites/{index:09d}"

    def size_of(self, index: int) -> tuple[int, int]:
        return self.sizes[0]

    def get(self, index: int, view: View, size: tuple[int, int]) -> Seen:
        """Image (3, height, width) uint8, scaled and perhaps mirrored, and caption."""
        composite, (height, width) = self.composites[index], size
        scaled = Image.fromarray(composite.image).resize((width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(scaled).transpose(2, 0, 1)  # (height, width, 3) -> (3, height, width)
        whole = Sizes(height, width, 0, 0, height, width)
        return Seen(np.ascontiguousarray(pixels[..., ::-1] if view.flip else pixels), composite.caption, whole)


def foreign_pictures(source: str, shards: str | None, count: int, resolution: int, seed: int) -> Samples | None:
    """The pictures that are sacrificed in place of the corpus' own; None: it is these that are.

    Args:
        source: of sacrificed canaries, `corpus` or `foreign`.
        shards: foreign pictures of the user's, of which the first are taken; None: those of the package.
        count: how many there are to be.

    Raises:
        ValueError: `source` is something else or does not go by the shards, or the shards are none.
    """
    if source not in ("corpus", "foreign"):
        raise ValueError(f"canaries.source must be corpus or foreign, got {source}")
    if source == "corpus" and shards is not None:
        raise ValueError(
            f"canaries.foreign={shards} names pictures to sacrifice, and canaries.source=corpus sacrifices yours; say "
            "canaries.source=foreign"
        )
    if source == "corpus" or count <= 0:
        return None
    if shards is None:
        return ForeignComposites(seed, count, resolution)
    try:
        return ShardSamples(shards, resolution)
    except ValueError as error:  # which speaks of the key that names shards as a rule
        raise ValueError(str(error).replace("data.shards", "canaries.foreign", 1)) from None
