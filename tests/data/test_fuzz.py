"""Tars with bytes flipped, cut, joined, zeroed and reordered: no crash, no chimera, no hang.

`pytest -m fuzz tests/data/test_fuzz.py` tries 10,000 mutations; without the marker it is a few, always the same.
"""

import contextlib
import functools
import io
import random
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from memtrain.data.images import BadSample
from memtrain.data.samples import ShardSamples
from tests.support.tars import sample, write_tar

KEYS = [f"{n}" * 9 for n in range(6)]
COLOURS = {key: (20 * n + 10, 250 - 20 * n, 128) for n, key in enumerate(KEYS)}
# of another archive of the same keys; all captions differ in every byte, so that no flipped bit makes one another
OTHERS = {key: ("abcdef"[n] * 9, (20 * n + 10, 250 - 20 * n, 30)) for n, key in enumerate(KEYS)}
MINE = {key: (key, colour) for key, colour in COLOURS.items()}
TRUE = dict([*MINE.values(), *OTHERS.values()])  # caption -> colour


def png(colour, side: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "PNG", compress_level=6 if side == 8 else 0)
    return out.getvalue()


def members(pairs: dict, side: int) -> list[tuple[str, bytes]]:
    """Samples by (caption, colour) of each key; a picture takes a block with a side of 8 px, 4 with one of 24."""
    return [part for key, (caption, colour) in pairs.items() for part in sample(key, caption, png(colour, side), "png")]


@functools.cache  # no fixture: Hypothesis would print it with each example
def archive(side: int, other: bool = False) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_tar(Path(folder) / "x.tar", members(OTHERS if other else MINE, side)).read_bytes()


@contextlib.contextmanager
def shards_in_memory():
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def read_all(folder: Path) -> int:
    """Read every sample. Returns how many were whole.

    What is read of a tar of which no byte was flipped is a picture and a caption of this very key and of one
    archive; of one that was flipped, a known picture under a known caption is its own.
    """
    try:
        samples = ShardSamples(str(folder), 8, cache_dir=folder / "cache")
    except ValueError as error:
        assert "no sample with an image and a caption" in str(error)
        return 0
    whole = 0
    with contextlib.closing(samples):
        for index in range(len(samples)):
            shard, _, key = samples.key(index).partition("/")
            try:
                image, caption, _ = samples.get(index)
            except BadSample:
                continue
            colour = tuple(image[:, 4, 4].tolist())
            if "flipped" not in shard:
                assert (caption, colour) in (MINE[key], OTHERS[key]), samples.key(index)
            if caption in TRUE and colour in TRUE.values():
                assert TRUE[caption] == colour, samples.key(index)
                whole += 1
        list(samples.skipped())
    return whole


def flip(data: bytes, places: list[tuple[float, int]]) -> bytes:
    changed = bytearray(data)
    for share, bits in places:
        changed[int(share * len(changed))] ^= bits
    return bytes(changed)


def mutate(folder: Path, places: list[tuple[float, int]], cut: float, join: float, seed: int, side: int) -> None:
    original, other = archive(side), archive(side, other=True)
    cut_at, join_at = int(cut * len(original)), int(join * len(other))
    # a splice that keeps to the blocks and leaves no header whole leaves no trace; that of a whole archive does
    assume(join_at == 0 or (cut_at - join_at) % 512)
    half = original[:cut_at]
    (folder / "0-flipped.tar").write_bytes(flip(original, places))
    (folder / "1-cut.tar").write_bytes(half)
    (folder / "2-joined.tar").write_bytes(half + other[join_at:])
    (folder / "3-flipped-and-joined.tar").write_bytes(flip(half + other, places))
    (folder / "4-cut-at-a-block-and-joined.tar").write_bytes(half[: cut_at // 512 * 512] + other)
    (folder / "5-broken-off.tar").write_bytes(half + bytes(len(original) - cut_at))
    parts = members(MINE, side)
    random.Random(seed).shuffle(parts)
    write_tar(folder / "6-reordered.tar", parts)


PLACES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=20)
MUTATIONS = dict(
    places=PLACES, cut=st.floats(0, 1), join=st.floats(0, 1), seed=st.integers(0, 2**16), side=st.sampled_from([8, 24])
)


def check_mutation(places, cut, join, seed, side):
    with shards_in_memory() as folder:
        mutate(folder, places, cut, join, seed, side)
        read_all(folder)


@given(**MUTATIONS)
@example(places=[(0.0, 1)], cut=0.6752415691776444, join=0.0, seed=0, side=8)  # a caption that ends in a header
@example(places=[(0.0, 1)], cut=0.53125, join=0.0, seed=0, side=8)  # a caption that is the name in a header
@settings(max_examples=60)
def test_no_mutation_crashes_or_makes_a_chimera(places, cut, join, seed, side):
    check_mutation(places, cut, join, seed, side)


@pytest.mark.fuzz
@given(**MUTATIONS)
@settings(max_examples=10_000, derandomize=False, print_blob=True)
def test_none_of_ten_thousand_mutations_crashes_or_makes_a_chimera(places, cut, join, seed, side):
    check_mutation(places, cut, join, seed, side)


def test_what_is_not_touched_is_read(tmp_path):
    (tmp_path / "0.tar").write_bytes(archive(8))
    (tmp_path / "1.tar").write_bytes(archive(24))
    assert read_all(tmp_path) == 12


def test_joined_tars_are_named(tmp_path):
    (tmp_path / "0.tar").write_bytes(archive(8) + archive(8, other=True))
    assert read_all(tmp_path) == 6
    with contextlib.closing(ShardSamples(str(tmp_path), 8)) as samples:
        assert [why for _, why in samples.skipped()] == [
            "shard goes on behind its end-of-archive mark (tars joined?); that is not read"
        ]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_what_is_no_file_is_no_sample(tmp_path, kind):
    """A link could name a file outside."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, link in (("a.png", "/etc/passwd"), ("a.txt", "/etc/passwd")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
        for name, data in sample("b", "b", png((1, 2, 3), 8), "png"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with contextlib.closing(ShardSamples(str(tmp_path), 8)) as samples:
        assert [samples.key(index) for index in range(len(samples))] == ["x.tar/b"]
