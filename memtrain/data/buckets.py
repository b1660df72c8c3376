"""Aspect-ratio buckets: sizes of about the same area, each batch of one of them, and which one a sample has."""

from __future__ import annotations

import numpy as np

from memtrain.data.derived import kept_buckets
from memtrain.data.images import picture_shape
from memtrain.data.indexed import IndexedShards
from memtrain.data.open_shards import OpenShards
from memtrain.data.row_filter import FilteredRows


def bucket_sizes(resolution: int, max_aspect_ratio: float, multiple: int) -> list[tuple[int, int]]:
    """(height, width) of each bucket, px: the square first, then multiples of `multiple` of at most its area.

    Raises:
        ValueError: the ratio is below 1, or there is nothing but the square although it is above.
    """
    if not 1 <= max_aspect_ratio < 16:
        raise ValueError(f"data.max_aspect_ratio must be in [1, 16), got {max_aspect_ratio:g}; 1 is the square alone")
    if multiple < 1:
        raise ValueError(f"data.bucket_multiple must be >= 1, got {multiple}")
    sizes = {(resolution, resolution)}
    if max_aspect_ratio > 1:
        for width in range(multiple, int(resolution * max_aspect_ratio) + 1, multiple):
            height = resolution**2 // width // multiple * multiple
            if height and max(height / width, width / height) <= max_aspect_ratio:
                sizes |= {(height, width), (width, height)}
        if len(sizes) == 1:
            raise ValueError(
                f"data.max_aspect_ratio={max_aspect_ratio:g} leaves the square alone at data.resolution={resolution} "
                f"and data.bucket_multiple={multiple}; raise the first or lower the last"
            )
    return sorted(sizes, key=lambda size: (size[0] != size[1], size[0] / size[1]))


def nearest_bucket(heights: np.ndarray, widths: np.ndarray, sizes: list[tuple[int, int]]) -> np.ndarray:
    """The bucket whose aspect ratio is nearest, by its logarithm. (n,) int16"""
    ratios = np.log([height / width for height, width in sizes])
    return np.abs(np.log(heights / widths)[:, None] - ratios).argmin(axis=1).astype(np.int16)


class RowBuckets:
    """The bucket of each row of the shards, sorted once and kept in the cache folder.

    Args:
        sizes: (height, width) of each bucket; of one alone, nothing is sorted.
        where: the filter whose rows these are.
    """

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        indexed: IndexedShards,
        shards: OpenShards,
        filtered: FilteredRows,
        where: str | None,
    ):
        self.sizes, self._shards = sizes, shards
        self._files: list[str] | None = None
        if len(sizes) > 1:
            self._files = [f"{stem}.npy" for stem in indexed.derived("buckets", f"{where} {sizes}")]
            kept_buckets(self._files, filtered.counts, self._sort)

    def of_shard(self, number: int) -> np.ndarray:
        """Which of `sizes` each row of a shard has. (rows,)"""
        assert self._files is not None, "there is but one bucket"
        return np.load(self._files[number], mmap_mode="r")

    def size(self, number: int, row: int) -> tuple[int, int]:
        """Height and width of the bucket of a row, px."""
        return self.sizes[0 if self._files is None else self.of_shard(number)[row]]

    def _sort(self, number: int) -> np.ndarray:
        """Sort a shard's rows by the columns height and width, else by their pictures' headers. (rows,) int16"""
        table = self._shards.columns(number, ("height", "width"))
        shapes = list(zip(*(table[name].to_pylist() for name in ("height", "width")), strict=True))
        shapes = [
            shape if all(isinstance(side, (int, float)) and side > 0 for side in shape)
            else picture_shape(self._shards[number].read(self._shards[number].record(row)["image"]))
            for row, shape in enumerate(shapes)
        ]  # fmt: skip
        heights, widths = np.array(shapes, dtype=np.float64).reshape(-1, 2).T  # (rows, 2) -> two of (rows,)
        return nearest_bucket(heights, widths, self.sizes)
