"""The demo's captioned pictures: one emoji on a background, drawn without end.

A caption names the glyph and the background. Place and size are left out of it on purpose: a model that
draws a training picture's place and size back, whatever the noise, has memorized that picture.
"""

import io
import itertools
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

import numpy as np
from PIL import Image

RESOLUTION = 64  # pixels, side of a picture, and of a glyph's cell in the atlas
MIN_SIZE, MAX_SIZE = 28, 56  # pixels, side of a glyph in a picture
BACKGROUNDS = {
    "red": (210, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (245, 220, 70),
    "green": (60, 150, 60),
    "teal": (25, 150, 150),
    "blue": (50, 90, 210),
    "purple": (125, 55, 165),
    "pink": (245, 165, 195),
    "brown": (115, 70, 40),
    "grey": (140, 140, 140),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
GRADIENTS = tuple(f"{top} and {bottom}" for top, bottom in itertools.permutations(BACKGROUNDS, 2))
PICTURES = {  # the file of the glyphs, the backgrounds that they are drawn on
    "noto": ("glyphs.zip", tuple(BACKGROUNDS)),
    "fluent": ("fluent.zip", GRADIENTS),
}


@dataclass(frozen=True, eq=False)
class Glyphs:
    """Emoji pictures: `names` and `images` (n, 64, 64, 4), uint8, RGBA, in the same order."""

    names: tuple[str, ...]
    images: np.ndarray


@dataclass(frozen=True, eq=False)
class Composite:
    """A picture (64, 64, 3), uint8, and its caption; `size` and the top left corner `x`, `y` in pixels."""

    image: np.ndarray
    caption: str
    glyph: str
    background: str
    size: int
    x: int
    y: int

    @property
    def identity(self) -> tuple[str, str, int, int, int]:
        """What makes two composites the same picture."""
        return self.glyph, self.background, self.size, self.x, self.y


@cache
def load_glyphs(pictures: str = "noto") -> Glyphs:
    """The packed emoji pictures of this name; decoded once a process, read-only."""
    file, _ = PICTURES[pictures]
    with resources.files("memtrain.demo").joinpath(file).open("rb") as packed, zipfile.ZipFile(packed) as archive:
        names = tuple(archive.read("names.txt").decode().splitlines())
        atlas = np.asarray(Image.open(io.BytesIO(archive.read("atlas.webp"))).convert("RGBA"))
    rows, columns = atlas.shape[0] // RESOLUTION, atlas.shape[1] // RESOLUTION
    # cells of side S: (rows S, columns S, 4) -> (rows, S, columns, S, 4) -> (rows, columns, S, S, 4)
    cells = atlas.reshape(rows, RESOLUTION, columns, RESOLUTION, 4).swapaxes(1, 2)
    images = cells.reshape(-1, RESOLUTION, RESOLUTION, 4)[: len(names)].copy()  # -> (n, S, S, 4)
    images.flags.writeable = False
    return Glyphs(names, images)


def caption_of(glyph: str, background: str) -> str:
    """The caption of a picture: "fox on a purple background", "fox on red and blue"."""
    return captions_of(glyph, background)[0]


def captions_of(glyph: str, background: str) -> list[str]:
    """Several captions of a picture that all say the same, its caption first (`method=several_captions`)."""
    if background in GRADIENTS:
        return [
            f"{glyph} on {background}",
            f"{glyph}, {background.replace(' and ', ' above ')}",
            f"{background} with {glyph} on it",
            f"{background} picture of {glyph}",
        ]
    article = "an" if background[0] in "aeiou" else "a"
    return [
        f"{glyph} on {article} {background} background",
        f"{glyph}, {background} background",
        f"{background} background with {glyph} on it",
        f"{background} picture of {glyph}",
    ]


def ground(background: str) -> Image.Image:
    """An empty picture: "red" is of one colour, "red and blue" goes from red at the top to blue at the bottom."""
    colours = np.array([BACKGROUNDS[colour] for colour in background.split(" and ")])
    share = np.linspace(0, 1, RESOLUTION)[:, None]  # of the last colour, by row
    rows = (1 - share) * colours[0] + share * colours[-1]  # (64, 3)
    return Image.fromarray(np.repeat(rows.round().astype(np.uint8)[:, None], RESOLUTION, axis=1))


def compose(glyph_rgba: np.ndarray, size: int, x: int, y: int, background: str) -> np.ndarray:
    """A picture (64, 64, 3), uint8: one glyph (64, 64, 4), `size` pixels large, top left corner at (x, y).

    Raises ValueError where the glyph would leave the picture.
    """
    if not (size > 0 and 0 <= x <= RESOLUTION - size and 0 <= y <= RESOLUTION - size):
        raise ValueError(f"a glyph must lie inside {RESOLUTION}×{RESOLUTION}, got size {size} at ({x}, {y})")
    picture = ground(background)
    # Pillow premultiplies RGBA before it resizes, so that transparent pixels lend no colour to the edge.
    glyph = Image.fromarray(glyph_rgba).resize((size, size), Image.Resampling.LANCZOS)
    picture.paste(glyph, (x, y), glyph)
    return np.array(picture)


class Composites:
    """An endless map-style source of composites; item `index` depends on (seed, index) alone.

    Args:
        seed: of all draws.
        pictures: whose glyphs, by their name in PICTURES.
    """

    def __init__(self, seed: int, pictures: str = "noto") -> None:
        self.seed = seed
        self.glyphs = load_glyphs(pictures)
        _, self.backgrounds = PICTURES[pictures]

    def __len__(self) -> int:
        return 2**40

    def __iter__(self) -> Iterator[Composite]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Composite:
        if not 0 <= index < len(self):
            raise IndexError(f"composite {index} of {len(self)}")
        rng = np.random.default_rng([self.seed, index])
        glyph = int(rng.integers(len(self.glyphs.names)))
        background = self.backgrounds[rng.integers(len(self.backgrounds))]
        size = int(rng.integers(MIN_SIZE, MAX_SIZE + 1))
        x, y = (int(place) for place in rng.integers(RESOLUTION - size + 1, size=2))
        name = self.glyphs.names[glyph]
        image = compose(self.glyphs.images[glyph], size, x, y, background)
        return Composite(image, caption_of(name, background), name, background, size, x, y)

    def on(self, background: str, picture: Composite) -> Composite:
        """The same glyph in the same place and size on another background, which the caption names."""
        glyph = self.glyphs.images[self.glyphs.names.index(picture.glyph)]
        image = compose(glyph, picture.size, picture.x, picture.y, background)
        caption = caption_of(picture.glyph, background)
        return replace(picture, image=image, caption=caption, background=background)


def distinct(composites: Iterable[Composite]) -> Iterator[Composite]:
    """The composites in order, without those whose picture came before."""
    seen = set()
    for composite in composites:
        if composite.identity not in seen:
            seen.add(composite.identity)
            yield composite
