"""Writes the demo's pictures as LAION-style shards, with a list of those that come often."""

import csv
import hashlib
import io
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.progress import track
from webdataset import TarWriter

from memtrain.core.files import written_aside
from memtrain.data.hashes import MIN_QUALITY, perceptual_hash
from memtrain.demo.canaries import jpeg, members_of, sample_of
from memtrain.demo.compose import Composite, Composites, captions_of, distinct
from memtrain.demo.corpus import SHARD_ROWS_IN_KEY, is_corpus, shard_count


@dataclass(frozen=True)
class CorpusReport:
    """What `write_corpus` left behind; `written` is False where the corpus was there already."""

    folder: Path
    num_samples: int
    num_shards: int
    num_bytes: int
    written: bool


def samples_of(recipe: dict) -> Iterator[tuple[Composite, bytes]]:
    """The corpus' pictures in order, each with its JPEG.

    The canaries show the first composites in which a perceptual hash finds features to compare. All others come
    once, those first that were passed over.
    """
    source, members = Composites(recipe["seed"], recipe["pictures"]), members_of(recipe)
    composites = distinct(source)
    canaries: list[Composite] = []
    once: list[Composite] = []
    while len(canaries) < sum(len(doses) for doses in recipe["doses"].values()):
        composite = next(composites)
        has_features = perceptual_hash(jpeg(composite.image))[1] >= MIN_QUALITY
        (canaries if has_features else once).append(composite)
    ordinary = itertools.chain(once, composites)
    for row in range(recipe["num_samples"]):
        if member := members.get(row):
            yield sample_of(source, canaries[member.canary], member)
        else:
            composite = next(ordinary)
            yield composite, jpeg(composite.image)


def key_of(row: int, shard_size: int) -> tuple[int, str]:
    """The shard and the key of a row of the corpus."""
    shard, place = divmod(row, shard_size)
    return shard, f"{shard * SHARD_ROWS_IN_KEY + place:09d}"


def write_canaries(file: Path, recipe: dict) -> None:
    """Lists the samples of the canaries as `canaries.file` reads them: sample key, number of the canary, its kind."""
    members = sorted(members_of(recipe).items(), key=lambda item: (item[1].canary, item[0]))
    with file.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(("key", "canary", "kind"))
        for row, member in members:
            shard, key = key_of(row, recipe["shard_size"])
            rows.writerow((f"{shard:05d}.tar/{key}", member.canary, member.kind))


def metadata(composite: Composite, key: str, encoded: bytes) -> dict:
    """The row of a sample in its json and in the parquet: img2dataset's columns, then the demo's own."""
    width, height = Image.open(io.BytesIO(encoded)).size
    captions = captions_of(composite.glyph, composite.background)
    return {
        "caption": composite.caption,
        "all_captions": sorted(captions, key=lambda caption: caption != composite.caption),  # its own first
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


def write_shard(folder: Path, shard: int, shard_size: int, samples: Iterator[tuple[Composite, bytes]]) -> None:
    """Write NNNNN.tar, NNNNN.parquet and, last, NNNNN_stats.json; only the stats hold the time of day."""
    start, rows = time.time(), []
    with TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
        for row, (composite, encoded) in enumerate(itertools.islice(samples, shard_size), shard * shard_size):
            _, key = key_of(row, shard_size)
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


def write_corpus(out: str | Path, recipe: dict, progress: bool = True) -> CorpusReport:
    """Write the corpus of a recipe (`recipe_of`) to the folder `out` as img2dataset would, and canaries.csv.

    Ordinary pictures are all distinct. The same recipe gives the same tars, parquets and list, byte for byte. All is
    written aside, next to `out`, and renamed at the end: an interrupted run leaves nothing that looks like a corpus.
    A corpus that is there is kept.

    Raises ValueError where `out` holds anything else; OSError from the disk.
    """
    out = Path(out)
    kept = is_corpus(out, recipe)
    if not kept:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(out, shared=True) as aside:
            aside.mkdir()
            samples = samples_of(recipe)
            for shard in track(range(shard_count(recipe)), "Writing shards", disable=not progress):
                write_shard(aside, shard, recipe["shard_size"], samples)
            write_canaries(aside / "canaries.csv", recipe)
            (aside / "corpus.json").write_text(json.dumps(recipe), encoding="utf-8")
    num_bytes = sum(file.stat().st_size for file in out.iterdir())
    return CorpusReport(out, recipe["num_samples"], shard_count(recipe), num_bytes, written=not kept)
