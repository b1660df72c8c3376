"""How a sample is looked at: where it is cropped, whether it is mirrored, which of its captions is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class View:
    """One look at a sample. All of it is drawn by the caller; the default looks straight at the middle."""

    crop: tuple[float, float] = (0.5, 0.5)  # where the crop lies, top to bottom and left to right, in [0, 1]
    flip: bool = False
    caption: float = 0.0  # which of several captions, in [0, 1)


STRAIGHT = View()


class Sizes(NamedTuple):
    """How a picture was cut, px: what Stable Diffusion XL is told (Podell et al. 2023, section 2.2), in its order.

    The whole picture is scaled with its aspect kept so that it just covers the target; there the crop begins at
    (crop_top, crop_left).
    """

    original_height: int  # of the whole, upright, as the shard holds it
    original_width: int
    crop_top: int
    crop_left: int
    target_height: int
    target_width: int

    def mirrored(self) -> Sizes:
        """The same crop, of the picture mirrored left to right."""
        scale = max(self.target_height / self.original_height, self.target_width / self.original_width)
        left_over = round(self.original_width * scale) - self.target_width
        return self._replace(crop_left=max(0, left_over - self.crop_left))


class Seen(NamedTuple):
    """A sample as a view of it shows it."""

    image: np.ndarray  # (3, height, width) uint8
    caption: str
    sizes: Sizes
