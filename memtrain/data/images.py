"""Bytes of a picture -> pixels of the size that is trained on. Plain JPEGs take a fast path."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate

from memtrain.data.shards import holds_header
from memtrain.data.view import Sizes

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves twice the pixels needed on either side,
# the gap that Pillow keeps for its thumbnails.
MARGIN = 2
FOREIGN = "image holds a tar header: the shard was cut inside it and joined to another"


class BadSample(Exception):
    """A sample that cannot be used; says why, in few words, so that causes can be counted."""


def decode_image(
    data: bytes, height: int, width: int, *, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> np.ndarray:
    """Bytes of a picture -> (3, height, width) uint8. See `decode_crop`."""
    return decode_crop(data, height, width, crop=crop, flip=flip)[0]


def decode_crop(
    data: bytes, height: int, width: int, *, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> tuple[np.ndarray, Sizes]:
    """Bytes of a picture -> (3, height, width) uint8, and how it was cut.

    Upright by EXIF, alpha on white, scaled with its aspect kept so that it just covers height x width, and
    cropped. The window is cut first, so that nothing is resampled that is thrown away.

    Args:
        data: JPEG, PNG, WebP, GIF, whatever Pillow reads.
        height, width: of the result, px.
        crop: where the window lies in what is left over, (y, x), as shares in [0, 1]; 0.5 is the centre.
        flip: mirror left to right, after the crop.

    Raises:
        BadSample: the bytes are not a whole picture, or one of more than 179 million pixels (Pillow's cap), or a
            tar's header lies among them.
    """
    if holds_header(data):
        raise BadSample(FOREIGN)
    with _decoding():
        pixels, cell, original = _decode(data, height, width)
    rows, columns = _window(pixels.shape[:2], (height, width), crop, cell)
    window = np.ascontiguousarray(pixels[rows, columns])
    channels_last = torch.from_numpy(window).permute(2, 0, 1)[None]  # (h, w, 3) -> (1, 3, h, w), the same bytes
    resized = interpolate(channels_last, size=(height, width), mode="bicubic", antialias=True)[0].numpy()
    top, left = _start(rows, height), _start(columns, width)
    sizes = Sizes(*original, top, left, height, width)
    return np.ascontiguousarray(resized[..., ::-1] if flip else resized), sizes.mirrored() if flip else sizes


def decode_image_with_pillow(
    data: bytes, height: int, width: int, *, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> np.ndarray:
    """`decode_image`, plain and slow: what the fast path is held against.

    They differ by 2 levels of 255 at most, and where a JPEG is reduced while it is decoded by 1 on average.
    """
    with _decoding():
        image = _to_rgb(ImageOps.exif_transpose(_open(data)))
    size, target = (image.height, image.width), (height, width)
    rows, columns = _window(size, target, crop, _reduction(size, target))
    image = image.crop((columns.start, rows.start, columns.stop, rows.stop))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if flip:
        image = ImageOps.mirror(image)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (h, w, 3) -> (3, h, w)


def picture_shape(data: bytes) -> tuple[int, int]:
    """Height and width of a picture, upright, px, from its header; a square where that cannot be read."""
    try:
        with _decoding():
            image = _open(data)
            turned = _orientation(image) in (5, 6, 7, 8)
    except BadSample:
        return 1, 1
    return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _decoding() -> Iterator[None]:
    """Silence Pillow's advice on pictures that it then decodes; make whatever it raises a BadSample."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # Pillow's plugins raise nearly anything on broken bytes
        raise BadSample(f"image cannot be decoded ({type(error).__name__})") from error


def _open(data: bytes) -> Image.Image:
    """Read the header alone. Pillow refuses here what has too many pixels."""
    image = Image.open(io.BytesIO(data))
    if image.format == "EPS":  # a program, which Pillow would have Ghostscript run
        raise UnidentifiedImageError("EPS")
    return image


def _decode(data: bytes, height: int, width: int) -> tuple[np.ndarray, int, tuple[int, int]]:
    """Pixels (h, w, 3), uint8, upright; the side of the cells in them, px, on whose edges the window must lie; and
    height and width of the whole picture, upright.

    The cells are what a JPEG of this size has for pixels once it is reduced; all formats keep to them, so
    that a picture gives the same window in each.
    """
    image = _open(data)
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
        orientation = _orientation(image)
        size, target = (image.height, image.width), (height, width)
        is_turned = orientation in (5, 6, 7, 8)
        reduction = _reduction(size, target[::-1] if is_turned else target)
        with suppress(ValueError):  # damage, small or large: Pillow has the last word
            pixels = _upright(_decode_jpeg(data, size, reduction), orientation)
            return pixels, 1, size[::-1] if is_turned else size
    image.load()
    pixels = _upright(np.array(_to_rgb(image)), _orientation(image))
    return pixels, _reduction(pixels.shape[:2], (height, width)), pixels.shape[:2]


def _reduction(size: tuple[int, int], target: tuple[int, int]) -> int:
    """By how much a JPEG of this (height, width) can be reduced while it is decoded: 1, 2, 4 or 8."""
    gap = min(side / wanted for side, wanted in zip(size, target, strict=True))
    return max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor * MARGIN <= gap)


def _decode_jpeg(data: bytes, size: tuple[int, int], reduction: int) -> np.ndarray:
    """Pixels as stored, (h // reduction, w // reduction, 3) uint8. Raises ValueError where libjpeg complains."""
    if simplejpeg.decode_jpeg_header(data)[:2] != size:  # a second header, that would evade the cap on pixels
        raise ValueError("two sizes")
    height, width = size
    pixels = simplejpeg.decode_jpeg(
        data,
        "RGB",
        min_height=-(-height // reduction),
        min_width=-(-width // reduction),
        min_factor=2,  # never a factor between 1/2 and 1: slower than the whole picture
    )
    return pixels[: height // reduction, : width // reduction]


def _orientation(image: Image.Image) -> int:
    """The EXIF tag, 1 to 8; 1 (upright) where there is none to be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag costs no picture
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror pixels (h, w, 3) as they were stored, so that they are upright; a view."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)  # (h, w, 3) -> (w, h, 3)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, alpha on white."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips instead of scaling
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _window(
    size: tuple[int, int], target: tuple[int, int], crop: tuple[float, float], cell: int
) -> tuple[slice, slice]:
    """Rows and columns of a picture of this (height, width) that, resized, are the target; whole cells."""
    cells = tuple(side // cell for side in size)
    scale = max(wanted / side for wanted, side in zip(target, cells, strict=True))
    slices = []
    for side, wanted, share in zip(cells, target, crop, strict=True):
        length = min(side, max(1, round(wanted / scale)))
        start = round(share * (side - length))
        slices.append(slice(start * cell, (start + length) * cell))
    return slices[0], slices[1]


def _start(window: slice, length: int) -> int:
    """Where a window, scaled to this length, begins in the side that it is cut from, scaled alike, px."""
    return round(window.start * length / (window.stop - window.start))
