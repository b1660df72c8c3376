"""Pictures as shards have them: the fast path is held against Pillow, broken bytes against one exception."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from memtrain.cli.bench import bench
from memtrain.data import images
from memtrain.data.bench import jpeg, photo
from memtrain.data.images import BadSample, decode_image, decode_image_with_pillow


def encoded(picture: Image.Image | np.ndarray, form: str, **options) -> bytes:
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, form, **options)
    return out.getvalue()


def plane(height: int, width: int) -> np.ndarray:
    """(height, width, 3): red counts rows, green counts columns."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(height)[:, None], np.arange(width)
    return pixels


def assert_near(decoded: np.ndarray, reference: np.ndarray, reduced: bool = False) -> None:
    """The tolerance, in levels of 255: 2 at most, and where the picture was reduced 1 on average."""
    assert decoded.shape == reference.shape and decoded.dtype == reference.dtype == np.uint8
    assert decoded.flags.c_contiguous
    difference = np.abs(decoded.astype(int) - reference)
    largest, mean = (8, 1.0) if reduced else (2, 0.2)
    assert difference.max() <= largest and difference.mean() <= mean, (difference.max(), difference.mean())


SIZES = {  # (height, width) -> by how much it can be reduced for 64 x 64 and 48 x 80
    (20, 30): (1, 1),
    (64, 64): (1, 1),
    (97, 129): (1, 1),
    (255, 400): (1, 2),
    (257, 330): (2, 2),
    (300, 600): (2, 2),
    (513, 660): (4, 4),
    (1025, 1301): (8, 8),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["colour", "grey", "progressive", "4:4:4"])
def test_the_fast_path_equals_pillow(size, kind):
    pixels = photo(sum(size), *size)
    data = {
        "colour": lambda: jpeg(pixels),
        "grey": lambda: jpeg(pixels[..., 0]),
        "progressive": lambda: jpeg(pixels, progressive=True, quality=80),
        "4:4:4": lambda: jpeg(pixels, subsampling=0),
    }[kind]()
    for target, reduction in zip(((64, 64), (48, 80)), SIZES[size], strict=True):
        assert images._reduction(size, target) == reduction
        for crop, flip in (((0.5, 0.5), False), ((0.0, 1.0), True), ((0.31, 0.77), False)):
            decoded = decode_image(data, *target, crop=crop, flip=flip)
            reference = decode_image_with_pillow(data, *target, crop=crop, flip=flip)
            assert_near(decoded, reference, reduction > 1)


@pytest.mark.parametrize("kind", ["colour", "grey", "progressive"])
def test_a_plain_jpeg_is_decoded_without_pillow(kind, monkeypatch):
    monkeypatch.setattr(images, "_to_rgb", None)
    pixels = photo(0, 40, 60)
    data = jpeg(pixels[..., 0] if kind == "grey" else pixels, progressive=kind == "progressive")
    assert decode_image(data, 16, 16).shape == (3, 16, 16)
    with pytest.raises(BadSample):
        decode_image_with_pillow(data, 16, 16)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000"])
def test_other_formats_equal_pillow_and_share_the_window(form):
    pixels = photo(3, 277, 401)  # a JPEG of this size would be reduced for 64 x 64
    options = {"lossless": True} if form == "WEBP" else {}
    for target in ((64, 64), (300, 200)):
        crop = (0.2, 0.9)
        decoded = decode_image(encoded(pixels, form, **options), *target, crop=crop)
        assert_near(decoded, decode_image_with_pillow(encoded(pixels, form, **options), *target, crop=crop))
        if form == "PNG":
            assert_near(decode_image(jpeg(pixels, quality=100), *target, crop=crop), decoded, reduced=True)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("form", "side"), [("JPEG", 90), ("JPEG", 400), ("PNG", 90), ("WEBP", 90)])
def test_every_exif_orientation_is_applied(orientation, form, side):
    size = (side, side * 4 // 5)
    pixels = Image.fromarray(photo(5, *size))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}}[form]
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(pixels, form, exif=exif, **options))))
    assert upright.size == (size if orientation >= 5 else size[::-1])
    decoded = decode_image(encoded(pixels, form, exif=exif, **options), 40, 24, crop=(0.0, 0.0))
    reference = decode_image_with_pillow(encoded(upright, "PNG"), 40, 24, crop=(0.0, 0.0))
    assert_near(decoded, reference, reduced=side == 400)


def test_a_damaged_orientation_costs_no_picture():
    pixels = photo(5, 40, 40)
    plain = decode_image(jpeg(pixels), 40, 40)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    for damaged in (b"", b"garbage", b"II*\0" + b"\xff" * 40, orientation.tobytes()[6:-9]):
        exif = b"Exif\0\0" + damaged
        assert np.array_equal(decode_image(jpeg(pixels, exif=exif), 40, 40), plain)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "I;16", "1", "RGB"])
def test_every_mode_becomes_rgb(mode):
    if mode == "I;16":
        data = encoded(np.full((30, 40), 128 * 257, dtype=np.uint16), "PNG")
    else:
        grey = Image.new("RGB", (40, 30), (128, 128, 128)).convert(mode)
        data = encoded(grey, "JPEG" if mode == "CMYK" else "PNG")
    decoded = decode_image(data, 16, 16)
    assert_near(decoded, decode_image_with_pillow(data, 16, 16))
    assert mode == "1" or abs(int(decoded.mean()) - 128) <= 4


def test_cmyk_and_palettes_keep_their_colours():
    red = Image.new("RGB", (40, 30), (250, 10, 20))
    cmyk, palette = encoded(red.convert("CMYK"), "JPEG", quality=95), encoded(red.quantize(4), "GIF")
    see_through = encoded(red.quantize(4), "GIF", transparency=0)
    for data, colour in ((cmyk, (250, 10, 20)), (palette, (250, 10, 20)), (see_through, (255, 255, 255))):
        decoded = decode_image(data, 16, 16)
        assert np.abs(decoded.mean(axis=(1, 2)) - colour).max() < 6


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize(("alpha", "level"), [(0, 255), (128, 127), (255, 0)])
def test_alpha_lies_on_white(form, alpha, level):
    data = encoded(Image.new("RGBA", (20, 20), (0, 0, 0, alpha)), form, lossless=True)
    decoded = decode_image(data, 16, 16)
    assert decoded.min() == decoded.max() == level


def test_the_crop_brings_the_pixels_it_names():
    wide, tall = encoded(plane(40, 60), "PNG"), encoded(plane(60, 40), "PNG")
    for share, start in ((0.0, 0), (0.5, 10), (1.0, 20)):
        for other in (0.0, 0.5, 1.0):  # no slack that way
            columns = decode_image(wide, 40, 40, crop=(other, share))
            assert np.array_equal(columns, plane(40, 60)[:, start : start + 40].transpose(2, 0, 1))
            rows = decode_image(tall, 40, 40, crop=(share, other))
            assert np.array_equal(rows, plane(60, 40)[start : start + 40].transpose(2, 0, 1))
    for share, start in ((0.0, 0), (0.5, 20), (1.0, 40)):  # half the size: a pixel is the mean of two
        columns = decode_image(jpeg(plane(80, 120), quality=100, subsampling=0), 40, 40, crop=(0.5, share))
        expected = np.arange(start, start + 80).reshape(40, 2).mean(axis=1)
        assert np.abs(columns[1, :, 2:-2] - expected[2:-2]).max() <= 3


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("crop", [(0.5, 0.5), (0.5, 0.0), (0.5, 1.0)])
def test_a_flip_mirrors_what_the_crop_left(form, crop):
    data = encoded(photo(2, 50, 90), form)
    flipped = decode_image(data, 32, 48, crop=crop, flip=True)
    assert np.array_equal(flipped[..., ::-1], decode_image(data, 32, 48, crop=crop))
    assert_near(flipped, decode_image_with_pillow(data, 32, 48, crop=crop, flip=True))


@pytest.mark.parametrize("size", [(1, 1), (16, 200), (200, 16), (17, 16), (3, 5), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("target", [(16, 16), (8, 24), (24, 8)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_any_shape_becomes_the_target(size, target, form):
    data = encoded(photo(0, 64, 64)[:1, :1].repeat(size[0], 0).repeat(size[1], 1), form)
    decoded = decode_image(data, *target)
    assert decoded.shape == (3, *target) and np.ptp(decoded, axis=(1, 2)).max() <= 1
    assert_near(decoded, decode_image_with_pillow(data, *target))


def test_the_aspect_is_kept():
    y, x = np.mgrid[:300, :500]
    disc = np.where((y - 150) ** 2 + (x - 250) ** 2 < 100**2, 0, 255).astype(np.uint8)
    for target, radius in (((60, 60), 20), ((60, 90), 20), ((100, 80), 100 / 3), ((600, 600), 200)):
        dark = decode_image(jpeg(disc), *target)[0] < 128
        assert abs(dark.any(0).sum() - 2 * radius) <= 2 and abs(dark.any(1).sum() - 2 * radius) <= 2


PICTURE = photo(1, 48, 64)
JPEG, PROGRESSIVE, GREY = jpeg(PICTURE), jpeg(PICTURE, progressive=True), jpeg(PICTURE[..., 0])
PNG, WEBP = encoded(PICTURE[:24, :24], "PNG"), encoded(PICTURE, "WEBP", quality=80)
FORMS = {"jpeg": JPEG, "progressive": PROGRESSIVE, "grey": GREY, "png": PNG, "webp": WEBP}


def with_size(data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose header claims this size."""
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + struct.pack(">HH", height, width) + data[frame + 4 :]


def cause(data: bytes) -> str:
    with pytest.raises(BadSample, match=r"^image cannot be decoded \(\w+\)$") as raised:
        decode_image(data, 16, 16)
    with pytest.raises(BadSample):
        decode_image_with_pillow(data, 16, 16)
    return str(raised.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 500, b"<html><body>404</body></html>", JPEG[:2], JPEG[:200], JPEG[:-400]],
    ids=["zero", "zeros", "html", "start", "header", "cut"],
)
def test_broken_bytes_are_a_bad_sample(data):
    cause(data)


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_picture_is_refused_and_never_filled_up(form):
    data = FORMS[form]
    for share in (0.05, 0.3, 0.6, 0.9):
        cause(data[: int(share * len(data))])
    assert cause(data[: len(data) // 2]) == cause(data[: len(data) * 2 // 3])  # causes can be counted


def test_postscript_is_never_run():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(program)).size == (40, 30)
    assert cause(program) == "image cannot be decoded (UnidentifiedImageError)"


def test_damage_that_pillow_forgives_is_forgiven():
    for data in (JPEG[:-2] + b"\0\x11\x22" + JPEG[-2:], JPEG + b"trailing bytes", JPEG + JPEG):
        assert_near(decode_image(data, 40, 40), decode_image_with_pillow(JPEG, 40, 40))


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    assert "DecompressionBomb" in cause(with_size(JPEG, 13400, 13400))  # 179.6 million pixels
    ihdr = b"IHDR" + struct.pack(">II", 60000, 60000) + PNG[24:29]
    assert "DecompressionBomb" in cause(PNG[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + PNG[33:])
    # Pillow refuses above twice this, and warns below
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 64 // 2)
    assert decode_image(JPEG, 16, 16).shape == (3, 16, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 64 // 2 - 1)
    assert "DecompressionBomb" in cause(JPEG)


def test_a_second_header_does_not_smuggle_a_bomb_past_the_first():
    frame = JPEG.index(b"\xff\xc0")
    length = 2 + struct.unpack(">H", JPEG[frame + 2 : frame + 4])[0]
    large = with_size(JPEG, 60000, 60000)[frame : frame + length]
    for place in (frame, frame + length):
        cause(JPEG[:place] + large + JPEG[place:])


edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)


@pytest.mark.parametrize("form", FORMS)
@given(flips=edits, header=edits, cut=st.none() | st.floats(0, 1))
@settings(max_examples=60)
def test_mutated_bytes_are_a_picture_or_a_bad_sample(form, flips, header, cut):
    """Nothing else is raised, Pillow's verdict is ours, and so are its pixels."""
    data = bytearray(FORMS[form])
    for share, byte in flips:
        data[int(share * len(data))] = byte
    for share, byte in header:
        data[int(share * 300)] = byte
    data = bytes(data if cut is None else data[: int(cut * len(data))])
    results = []
    for decode in (decode_image, decode_image_with_pillow):
        try:
            results.append(decode(data, 16, 16))
        except BadSample as problem:
            results.append(str(problem))
    decoded, reference = results
    if isinstance(reference, str):
        assert decoded == reference
    else:
        assert_near(decoded, reference, reduced=True)


def test_bench_prints_both_pipelines_and_the_ratio(capsys):
    bench(["data", "--images", "2", "--rounds", "1", "--json"])
    speed = json.loads(capsys.readouterr().out)
    rates, speedup = speed["images_per_second"], speed["speedup"]
    assert set(rates) == {*speedup, "memtrain"} and len(rates) == 3 and min(rates.values()) > 0
    for name, ratio in speedup.items():
        assert ratio == pytest.approx(rates["memtrain"] / rates[name])  # one round is its own median
    bench(["data", "--images", "1", "--rounds", "2"])
    out = capsys.readouterr().out
    assert all(name in out for name in rates) and "x as fast" in out and "640x720" in out


@pytest.mark.parametrize(("option", "other"), [("--images", "--rounds"), ("--rounds", "--images")])
def test_bench_needs_something_to_measure(option, other):
    with pytest.raises(ValueError, match=f"{option} must be >= 1, got 0"):
        bench(["data", option, "0", other, "1"])
