"""Aspect-ratio buckets: sizes of about the same area, each batch of one of them."""

from __future__ import annotations

import numpy as np


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
