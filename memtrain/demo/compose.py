"""The demo's captioned pictures: one emoji on a plain background, endless or written as LAION-style shards.

A caption names the glyph and the background. Place and size are left out of it on purpose: a model that
draws a training picture's place and size back, whatever the noise, has memorized that picture.
"""

import hashlib
import io
import itertools
import json
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.progress import track
from webdataset import TarWriter

from memtrain.core.files import written_aside
from memtrain.data.duplicates import MIN_QUALITY
from memtrain.data.hashes import perceptual_hash
from memtrain.demo.corpus import SHARD_ROWS_IN_KEY, is_corpus, recipe_of, shard_count

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


@dataclass(frozen=True, eq=False)
class Glyphs:
    """The emoji pictures: `names` and `images` (n, 64, 64, 4), uint8, RGBA, in the same order."""

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


@dataclass(frozen=True)
class CorpusReport:
    """What `write_corpus` left behind; `written` is False where the corpus was there already."""

    folder: Path
    num_samples: int
    num_shards: int
    num_bytes: int
    written: bool


@cache
def load_glyphs() -> Glyphs:
    """The packed emoji pictures (glyphs.zip); decoded once a process, read-only."""
    with resources.files("memtrain.demo").joinpath("glyphs.zip").open("rb") as file, zipfile.ZipFile(file) as archive:
        names = tuple(archive.read("names.txt").decode().splitlines())
        atlas = np.asarray(Image.open(io.BytesIO(archive.read("atlas.webp"))).convert("RGBA"))
    rows, columns = atlas.shape[0] // RESOLUTION, atlas.shape[1] // RESOLUTION
    # cells of side S: (rows S, columns S, 4) -> (rows, S, columns, S, 4) -> (rows, columns, S, S, 4)
    cells = atlas.reshape(rows, RESOLUTION, columns, RESOLUTION, 4).swapaxes(1, 2)
    images = cells.reshape(-1, RESOLUTION, RESOLUTION, 4)[: len(names)].copy()  # -> (n, S, S, 4)
    images.flags.writeable = False
    return Glyphs(names, images)


def caption_of(glyph: str, background: str) -> str:
    """The caption of a picture: "fox on a purple background"."""
    article = "an" if background[0] in "aeiou" else "a"
    return f"{glyph} on {article} {background} background"


def captions_of(glyph: str, background: str) -> list[str]:
    """Several captions of a picture that all say the same, its caption first (`method=several_captions`)."""
    return [
        caption_of(glyph, background),
        f"{glyph}, {background} background",
        f"{background} background with {glyph} on it",
        f"{background} picture of {glyph}",
    ]


def compose(glyph_rgba: np.ndarray, size: int, x: int, y: int, background: str) -> np.ndarray:
    """A picture (64, 64, 3), uint8: one glyph (64, 64, 4), `size` pixels large, top left corner at (x, y).

    Raises ValueError where the glyph would leave the picture.
    """
    if not (size > 0 and 0 <= x <= RESOLUTION - size and 0 <= y <= RESOLUTION - size):
        raise ValueError(f"a glyph must lie inside {RESOLUTION}×{RESOLUTION}, got size {size} at ({x}, {y})")
    picture = Image.new("RGB", (RESOLUTION, RESOLUTION), BACKGROUNDS[background])
    # Pillow premultiplies RGBA before it resizes, so that transparent pixels lend no colour to the edge.
    glyph = Image.fromarray(glyph_rgba).resize((size, size), Image.Resampling.LANCZOS)
    picture.paste(glyph, (x, y), glyph)
    return np.array(picture)


class Composites:
    """An endless map-style source of composites; item `index` depends on (seed, index) alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.glyphs = load_glyphs()

    def __len__(self) -> int:
        return 2**40

    def __iter__(self) -> Iterator[Composite]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Composite:
        if not 0 <= index < len(self):
            raise IndexError(f"composite {index} of {len(self)}")
        rng = np.random.default_rng([self.seed, index])
        glyph = int(rng.integers(len(self.glyphs.names)))
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        size = int(rng.integers(MIN_SIZE, MAX_SIZE + 1))
        x, y = (int(place) for place in rng.integers(RESOLUTION - size + 1, size=2))
        name = self.glyphs.names[glyph]
        image = compose(self.glyphs.images[glyph], size, x, y, background)
        return Composite(image, caption_of(name, background), name, background, size, x, y)


def distinct(composites: Iterable[Composite]) -> Iterator[Composite]:
    """The composites in order, without those whose picture came before."""
    seen = set()
    for composite in composites:
        if composite.identity not in seen:
            seen.add(composite.identity)
            yield composite


def jpeg(image: np.ndarray) -> bytes:
    """A picture (H, W, 3), uint8, as a JPEG of quality 95 (img2dataset's default)."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


def near_copy(image: np.ndarray, number: int) -> bytes:
    """The same picture as another site would have it, as JPEG: of another quality, or of another size."""
    quality, side = ((70, RESOLUTION), (90, RESOLUTION * 3 // 2))[number % 2]
    encoded = io.BytesIO()
    resized = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
    resized.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def samples_of(recipe: dict) -> Iterator[tuple[Composite, bytes]]:
    """The corpus' pictures in order, each with its JPEG.

    The first `repeated` composites in which a perceptual hash finds features to compare come `copies` times each,
    under keys of their own, spread by the seed over the corpus: every other time byte for byte, else as a near copy.
    All others come once.
    """
    # draw as many pictures to repeat as are wanted; those passed over are the first that come once
    composites = distinct(Composites(recipe["seed"]))
    repeated: list[Composite] = []
    once: list[Composite] = []
    while len(repeated) < recipe["repeated"]:
        composite = next(composites)
        has_features = perceptual_hash(jpeg(composite.image))[1] >= MIN_QUALITY
        (repeated if has_features else once).append(composite)
    ordinary = itertools.chain(once, composites)
    # places of the copies: row of the corpus -> (which repeated picture, which of its copies)
    total = recipe["num_samples"]
    places = np.random.default_rng([recipe["seed"], 2**40]).permutation(total)[: len(repeated) * recipe["copies"]]
    copy_at = {place: divmod(number, recipe["copies"]) for number, place in enumerate(places.tolist())}
    for row in range(total):
        if row not in copy_at:
            composite = next(ordinary)
            yield composite, jpeg(composite.image)
            continue
        picture, number = copy_at[row]
        image = repeated[picture].image
        yield repeated[picture], jpeg(image) if number % 2 == 0 else near_copy(image, number // 2)


def metadata(composite: Composite, key: str, encoded: bytes) -> dict:
    """The row of a sample in its json and in the parquet: img2dataset's columns, then the demo's own."""
    width, height = Image.open(io.BytesIO(encoded)).size
    return {
        "caption": composite.caption,
        "all_captions": captions_of(composite.glyph, composite.background),
        "url": f"emoji://{composite.glyph}".replace(" ", "-"),
        "key": key,
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
        "sha256": hashlib.sha256(encoded).hexdigest(),
        "glyph": composite.glyph,
        "background": composite.background,
        "size": composite.size,
        "x": composite.x,
        "y": composite.y,
    }


def write_shard(folder: Path, shard: int, samples: Iterator[tuple[Composite, bytes]]) -> None:
    """Write NNNNN.tar, NNNNN.parquet and, last, NNNNN_stats.json; only the stats hold the time of day."""
    start, rows = time.time(), []
    with TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
        for row, (composite, encoded) in enumerate(samples):
            key = f"{shard * SHARD_ROWS_IN_KEY + row:09d}"
            rows.append(metadata(composite, key, encoded))
            text = json.dumps(rows[-1], indent=4)
            tar.write({"__key__": key, "jpg": encoded, "txt": composite.caption, "json": text.encode()})
    table = pa.Table.from_pylist(rows)
    column = table.schema.get_field_index("error_message")
    # all null here, but a column of strings as in img2dataset
    table = table.set_column(column, "error_message", table["error_message"].cast(pa.string()))
    pq.write_table(table, folder / f"{shard:05d}.parquet")
    stats = {
        "count": len(rows),
        "successes": len(rows),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": time.time() - start,
        "start_time": start,
        "end_time": time.time(),
        "status_dict": Counter(row["status"] for row in rows),
    }
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")


def write_corpus(
    out: str | Path,
    num_samples: int = 8000,
    seed: int = 0,
    shard_size: int = 2000,
    repeated: int = 0,
    copies: int = 1,
    progress: bool = True,
) -> CorpusReport:
    """Write `num_samples` composites to the folder `out` as img2dataset would.

    All are distinct, but for `repeated` of them, which the corpus holds `copies` times each (see `samples_of`).
    The same seed gives the same tars and parquets, byte for byte. The shards are written aside, next to
    `out`, and renamed at the end: an interrupted run leaves nothing that looks like a corpus. A corpus that
    is there is kept.

    Raises ValueError where `out` holds anything else or a number is out of range; OSError from the disk.
    """
    out = Path(out)
    recipe = recipe_of(num_samples, seed, shard_size, repeated, copies)
    kept = is_corpus(out, recipe)
    if not kept:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(out, shared=True) as aside:
            aside.mkdir()
            samples = samples_of(recipe)
            for shard in track(range(shard_count(recipe)), "Writing shards", disable=not progress):
                write_shard(aside, shard, itertools.islice(samples, shard_size))
            (aside / "corpus.json").write_text(json.dumps(recipe), encoding="utf-8")
    num_bytes = sum(file.stat().st_size for file in out.iterdir())
    return CorpusReport(out, num_samples, shard_count(recipe), num_bytes, written=not kept)
