"""Corpora for tests: real tars, with every fault that docs/shards.md lists, each known by name."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.tars import Members, write_tar


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def textured(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture of large and small features, unlike that of any other seed; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    grids = [Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)) for n in (3, 6, 12, 24)]
    layers = [np.asarray(grid.resize(size, Image.Resampling.BICUBIC)) for grid in grids]
    return Image.fromarray(np.average(layers, axis=0, weights=(4, 3, 2, 1)).astype(np.uint8))


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (96, 80)) -> Image.Image:
    return Image.new("RGB", size, colour)


def sample(
    key: str,
    image: bytes,
    caption: str | bytes | None = "a caption",
    ext: str = "jpg",
    json_bytes: bytes | None = None,
) -> Members:
    """The members of one sample; no caption, no .txt."""
    metadata = {"key": key, "sha256": hashlib.sha256(image).hexdigest(), "exif": None}
    members = [(f"{key}.{ext}", image), (f"{key}.json", json_bytes or json.dumps(metadata).encode())]
    if caption is not None:
        members.append((f"{key}.txt", caption.encode() if isinstance(caption, str) else caption))
    return members


def write_stats(tar: Path, successes: int) -> None:
    stats = {"count": successes, "successes": successes, "failed_to_download": 0, "failed_to_resize": 0}
    tar.with_name(f"{tar.stem}_stats.json").write_text(json.dumps(stats))


def cut(tar: Path, member: str, where: str) -> None:
    """Truncate a tar inside this member's `header` or `bytes`, or where it would begin (`before`)."""
    with tarfile.open(tar) as file:
        info = file.getmember(member)
    middle = info.offset_data + info.size // 2
    place = {"before": info.offset, "header": info.offset + 300, "bytes": middle}[where]
    with tar.open("r+b") as file:
        file.truncate(place)


def png_bomb(side: int = 50_000) -> bytes:
    """A small PNG whose header claims side × side pixels."""
    data = bytearray(encode(flat((0, 0, 0), (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def jpeg_bomb(side: int = 60_000) -> bytes:
    """A small JPEG whose header claims side × side pixels."""
    data = encode(flat((0, 0, 0), (8, 8)), "JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", side, side) + data[place + 4 :]


def turned(image: Image.Image, orientation: int = 6) -> bytes:
    """A JPEG that its EXIF tag turns."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, "JPEG", quality=95, exif=exif)


@dataclass(frozen=True)
class Planted:
    """A fault: name of the sample (shard/key) or of the shard, kind, and a regex of the cause.

    `kind` is of memtrain.data.check.KINDS; `lost` where training does without it.
    """

    name: str
    kind: str
    cause: str
    lost: bool = True


@dataclass
class FaultyCorpus:
    """`captions`: of each sample that training sees, in shard order, as it is to be seen; by sample name."""

    folder: Path
    captions: dict[str, str] = field(default_factory=dict)
    faults: list[Planted] = field(default_factory=list)

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.rglob("*.tar"))


def corpus_with_every_fault(folder: Path) -> FaultyCorpus:
    """Nine shards of unequal size in `folder` with every fault of docs/shards.md that can lie on a disk.

    What is odd and yet to be trained on stands between what is broken, so that a good neighbour that is lost
    shows. Not in it, for a folder cannot show it: a shard that vanishes, and fewer shards than readers.
    """
    corpus = FaultyCorpus(folder)
    seeds = iter(range(1000))

    def new(size: tuple[int, int] = (96, 80)) -> Image.Image:
        return textured(next(seeds), size)

    def shard(name: str, samples: Sequence[tuple[str, str | None, Members]], successes: int | None) -> Path:
        """`samples`: (key, caption as it is to be seen, or None where it is not, members)."""
        path = write_tar(folder / name, [member for *_, members in samples for member in members])
        corpus.captions.update({f"{name}/{key}": seen for key, seen, _ in samples if seen is not None})
        if successes is not None:
            write_stats(path, successes)
        return path

    def good(number: int, caption: str = "a good neighbour") -> tuple[str, str, Members]:
        key = f"{number:09d}"
        return key, caption, sample(key, encode(new()), caption)

    def with_json(key: str, data: bytes) -> tuple[str, str, Members]:
        return key, "about its json", sample(key, encode(new()), "about its json", json_bytes=data)

    def fault(name: str, kind: str, cause: str, lost: bool = True) -> None:
        corpus.faults.append(Planted(name, kind, cause, lost))

    # captions and jsons
    nothing, no_utf8, blank = "000000001", "000000003", "000000004"
    shard(
        "00000.tar",
        [
            good(0, "the first of all"),
            (nothing, None, sample(nothing, encode(new()), None)),
            ("000000002", "", sample("000000002", encode(new()), b"")),
            (no_utf8, "caf\ufffd au lait", sample(no_utf8, encode(new()), "café au lait".encode("latin-1"))),
            (blank, "", sample(blank, encode(new()), b" \n")),
            with_json("000000005", b'{"similarity": NaN, "exif": null}'),
            with_json("000000006", b"{}"),
            with_json("000000007", b'{"caption": "bro'),
            ("000000008", "no json", [("000000008.jpg", encode(new())), ("000000008.txt", b"no json")]),
            good(9),
        ],
        successes=10,
    )
    fault(f"00000.tar/{nothing}", "no_caption", "no caption")
    fault("00000.tar/000000002", "empty_caption", "empty", lost=False)
    fault(f"00000.tar/{no_utf8}", "caption_not_utf8", "not UTF-8", lost=False)
    fault(f"00000.tar/{blank}", "empty_caption", "empty", lost=False)
    fault("00000.tar/000000007", "bad_json", "json", lost=False)

    # images of every mode, all of them good
    grey16 = Image.fromarray(np.asarray(new().convert("L")).astype(np.uint16) * 257)
    modes = {
        "L": encode(new().convert("L")),
        "CMYK": encode(new().convert("CMYK")),
        "I;16": encode(grey16, "PNG"),
        "P": encode(new().quantize(), "PNG"),
        "RGBA": encode(Image.merge("RGBA", (*new().split(), new().convert("L"))), "PNG"),
        "webp": encode(new(), "WEBP"),
        "turned": turned(new()),
    }
    extensions = {"I;16": "png", "P": "png", "RGBA": "png", "webp": "webp"}
    odd = [
        (f"00001{n:04d}", mode, sample(f"00001{n:04d}", data, mode, extensions.get(mode, "jpg")))
        for n, (mode, data) in enumerate(modes.items())
    ]
    dotted = ("a.b", "dotted", sample("a.b", encode(new()), "dotted", "JPG"))
    shard("00001.tar", [*odd, dotted], successes=8)

    # images that are none
    whole = encode(new(), "JPEG", quality=95)
    broken = {
        "000020001": b"<html><body>404 Not Found</body></html>",
        "000020002": b"",
        "000020003": whole[: len(whole) // 2],
        "000020004": png_bomb(),
        "000020005": jpeg_bomb(),
    }
    shard(
        "00002.tar",
        [
            good(20000),
            *((key, None, sample(key, data, f"broken {key}")) for key, data in broken.items()),
            ("000020006", None, [("000020006.txt", b"no image at all"), ("000020006.json", b"{}")]),
            good(20007),
        ],
        successes=8,
    )
    for key in broken:
        fault(f"00002.tar/{key}", "unreadable_image", "image")
    fault("00002.tar/000020006", "no_image", "no image")

    # keys and images that come twice
    picture = encode(new())
    first = ("000030000", "the first of its key", sample("000030000", picture, "the first of its key"))
    again = ("000030000", None, sample("000030000", encode(new()), "its key is taken"))
    copy = ("000030002", "a copy", sample("000030002", picture, "a copy"))
    shard("00003.tar", [first, again, copy, good(30003)], successes=4)
    fault("00003.tar/000030000", "duplicate_key", "twice")
    fault("00003.tar/000030002", "duplicate_within", "same image as .*000030000", lost=False)
    far = ("000040001", "a copy far off", sample("000040001", picture, "a copy far off"))
    shard("00004.tar", [good(0, "a key of another shard"), far], successes=2)
    fault("00004.tar/000040001", "duplicate_across", r"same image as 00003\.tar/000030000", lost=False)
    fault("00004.tar/000000000", "key_across", r"00000\.tar", lost=False)

    # tars that are cut, each before one that begins with the key that was cut
    a, b = good(50000), good(50001)
    cut(shard("00005.tar", [a, b], successes=2), "000050001.json", "bytes")
    del corpus.captions["00005.tar/000050001"]
    fault("00005.tar/000050001.json", "damage", "cut")
    fault("00005.tar/000050001", "no_caption", "no caption")
    b = good(50001, "of the shard after the cut")
    shard("00006.tar", [b, good(60001)], successes=None)
    fault("00006.tar", "stats_missing", "00006_stats.json", lost=False)
    a, b, c = good(70000), good(70001), good(70002)
    cut(shard("00007.tar", [a, b, c], successes=3), "000070002.jpg", "header")
    del corpus.captions["00007.tar/000070002"]
    fault("00007.tar", "damage", "end-of-archive|cannot be read")
    fault("00007.tar", "stats_disagree", "3 successes.* 2 samples")

    # no tar at all
    (folder / "00008.tar").write_bytes(b"")
    write_stats(folder / "00008.tar", 0)
    fault("00008.tar", "damage", "empty")
    return corpus
