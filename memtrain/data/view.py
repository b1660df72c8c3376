"""How a sample is looked at: where it is cropped, whether it is mirrored, which of its captions is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """One look at a sample. All of it is drawn by the caller; the default looks straight at the middle."""

    crop: tuple[float, float] = (0.5, 0.5)  # where the crop lies, top to bottom and left to right, in [0, 1]
    flip: bool = False
    caption: float = 0.0  # which of several captions, in [0, 1)


STRAIGHT = View()
