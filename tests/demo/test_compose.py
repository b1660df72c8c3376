import hashlib
import io
import itertools
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from memtrain.demo.compose import (
    BACKGROUNDS,
    MAX_SIZE,
    MIN_SIZE,
    RESOLUTION,
    Composites,
    compose,
    distinct,
    load_glyphs,
    write_corpus,
)

NUM_SAMPLES, SHARD_SIZE = 50, 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    write_corpus(folder, NUM_SAMPLES, seed=3, shard_size=SHARD_SIZE, progress=False)
    return folder


def contents(folder, pattern):
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def test_glyphs_are_named_once_and_visible():
    glyphs = load_glyphs()
    assert len(glyphs.names) == len(set(glyphs.names)) == len(glyphs.images) > 1500
    assert glyphs.images[..., 3].reshape(len(glyphs.names), -1).any(axis=1).all()
    assert all(re.search(r"\w", name) and name == " ".join(name.lower().split()) for name in glyphs.names)


def test_a_composite_depends_on_seed_and_index_alone():
    one, other = Composites(0), Composites(0)
    assert np.array_equal(one[7].image, other[7].image) and one[7].identity == other[7].identity
    assert one[7].identity != one[8].identity != Composites(1)[8].identity
    assert one[2**39].caption  # far away costs nothing
    with pytest.raises(IndexError):
        one[len(one)]


def test_nothing_of_the_glyph_is_outside_the_picture():
    for composite in itertools.islice(distinct(Composites(0)), 200):
        assert MIN_SIZE <= composite.size <= MAX_SIZE
        assert composite.image.shape == (RESOLUTION, RESOLUTION, 3)
        outside = np.ones((RESOLUTION, RESOLUTION), bool)
        x, y, size = composite.x, composite.y, composite.size
        outside[y : y + size, x : x + size] = False
        assert (composite.image[outside] == BACKGROUNDS[composite.background]).all()
    with pytest.raises(ValueError, match="inside"):
        compose(load_glyphs().images[0], size=40, x=30, y=0, background="red")


def test_transparent_pixels_lend_no_colour():
    clear_white, disc = np.zeros((RESOLUTION, RESOLUTION, 4), np.uint8), np.s_[16:48, 16:48]
    clear_white[..., :3] = 255
    clear_white[disc] = (0, 0, 0, 255)
    assert compose(clear_white, 40, 0, 0, "black").max() <= max(BACKGROUNDS["black"])


def test_the_caption_tells_neither_place_nor_size():
    composites = Composites(0)
    pictures = [composites[index] for index in range(300)]
    for picture in pictures:
        article = "an" if picture.background == "orange" else "a"
        assert picture.caption == f"{picture.glyph} on {article} {picture.background} background"
    assert len({(p.size, p.x, p.y) for p in pictures}) > 250


def test_the_corpus_never_repeats_a_picture():
    composites = Composites(0)
    first = [composites[index] for index in range(5)]
    every_picture_twice = [first[index // 2] for index in range(10)]
    assert [picture.identity for picture in itertools.islice(distinct(every_picture_twice), 5)] == [
        picture.identity for picture in first
    ]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the tar open
def test_webdataset_reads_what_parquet_and_stats_say(corpus):
    assert sorted(path.name for path in corpus.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    total = 0
    for shard, tar in enumerate(sorted(corpus.glob("*.tar"))):
        rows = pq.read_table(tar.with_suffix(".parquet")).to_pylist()
        stats = json.loads((corpus / f"{tar.stem}_stats.json").read_text())
        samples = list(wds.WebDataset(str(tar), shardshuffle=False, empty_check=False))
        assert stats["count"] == stats["successes"] == len(rows) == len(samples)
        for place, (sample, row) in enumerate(zip(samples, rows, strict=True)):
            assert {"jpg", "txt", "json"} <= sample.keys()
            assert json.loads(sample["json"]) == row
            assert sample["__key__"] == row["key"] == f"{shard * 10_000 + place:09d}"
            assert sample["txt"].decode() == row["caption"] == row["all_captions"][0]
            assert all(row["glyph"] in text and row["background"] in text for text in row["all_captions"])
            assert len(set(row["all_captions"])) == len(row["all_captions"]) > 2
            assert hashlib.sha256(sample["jpg"]).hexdigest() == row["sha256"]
            assert Image.open(io.BytesIO(sample["jpg"])).size == (row["width"], row["height"]) == (64, 64)
        total += len(samples)
    assert total == NUM_SAMPLES


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    write_corpus(same, NUM_SAMPLES, seed=3, shard_size=SHARD_SIZE, progress=False)
    write_corpus(other, NUM_SAMPLES, seed=4, shard_size=SHARD_SIZE, progress=False)
    for pattern in ("*.tar", "*.parquet"):
        assert contents(corpus, pattern) == contents(same, pattern) != contents(other, pattern)


def test_a_second_write_changes_nothing(corpus):
    before = {path: path.stat().st_mtime_ns for path in corpus.iterdir()}
    report = write_corpus(corpus, NUM_SAMPLES, seed=3, shard_size=SHARD_SIZE, progress=False)
    assert not report.written and report.num_samples == NUM_SAMPLES
    assert before == {path: path.stat().st_mtime_ns for path in corpus.iterdir()}


def test_another_corpus_or_folder_is_refused_and_kept(corpus, tmp_path):
    with pytest.raises(ValueError, match=f"{corpus}.*delete it or choose another"):
        write_corpus(corpus, NUM_SAMPLES, seed=4, shard_size=SHARD_SIZE, progress=False)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=f"{tmp_path}.*delete it or choose another"):
        write_corpus(tmp_path, NUM_SAMPLES, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_write_is_not_a_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("memtrain.demo.compose.pq.write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_corpus(tmp_path / "corpus", NUM_SAMPLES, progress=False)
    assert not (tmp_path / "corpus").exists()
    monkeypatch.undo()
    assert write_corpus(tmp_path / "corpus", NUM_SAMPLES, progress=False).written
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def full_disk(*_):
    raise OSError(28, "No space left on device")
