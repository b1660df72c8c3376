import hashlib
import itertools
import re

import numpy as np
import pytest

from memtrain.demo.compose import (
    BACKGROUNDS,
    GRADIENTS,
    MAX_SIZE,
    MIN_SIZE,
    PICTURES,
    RESOLUTION,
    Composites,
    compose,
    distinct,
    ground,
    load_glyphs,
)

# of the pictures and captions that the package's models were pretrained on
STREAM = "413841bfefbbb1969a4be3f06890be60845e2465fc6f4897307a4ad172981c83"


@pytest.mark.parametrize("pictures", PICTURES)
def test_glyphs_are_named_once_and_visible(pictures):
    glyphs = load_glyphs(pictures)
    assert len(glyphs.names) == len(set(glyphs.names)) == len(glyphs.images) > 1500
    assert glyphs.images[..., 3].reshape(len(glyphs.names), -1).any(axis=1).all()
    assert all(re.search(r"\w", name) and name == " ".join(name.lower().split()) for name in glyphs.names)


def test_fluent_shows_what_the_models_know_by_name():
    assert set(load_glyphs("fluent").names) < set(load_glyphs("noto").names)
    assert (load_glyphs("fluent").images[0] != load_glyphs("noto").images[0]).any()


def test_the_stream_is_what_the_models_were_pretrained_on():
    composites, digest = Composites(0), hashlib.sha256()
    for index in [*range(40), 2**39, 2**39 + 1]:
        digest.update(composites[index].image.tobytes())
        digest.update(composites[index].caption.encode())
    assert digest.hexdigest() == STREAM


def test_a_ground_has_the_colours_that_its_name_says():
    assert (np.array(ground("red")) == BACKGROUNDS["red"]).all()
    pixels = np.array(ground("teal and pink")).astype(int)  # (64, 64, 3)
    assert (pixels[0] == BACKGROUNDS["teal"]).all() and (pixels[-1] == BACKGROUNDS["pink"]).all()
    assert (pixels == pixels[:, :1]).all()
    middle = np.add(BACKGROUNDS["teal"], BACKGROUNDS["pink"]) / 2
    assert (abs(pixels[31:33].mean(axis=(0, 1)) - middle) < 1).all()
    assert len(set(GRADIENTS)) == len(BACKGROUNDS) * (len(BACKGROUNDS) - 1)


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
    fluent = Composites(0, "fluent")[0]
    assert fluent.background in GRADIENTS and fluent.caption == f"{fluent.glyph} on {fluent.background}"


def test_the_corpus_never_repeats_a_picture():
    composites = Composites(0)
    first = [composites[index] for index in range(5)]
    every_picture_twice = [first[index // 2] for index in range(10)]
    assert [picture.identity for picture in itertools.islice(distinct(every_picture_twice), 5)] == [
        picture.identity for picture in first
    ]
