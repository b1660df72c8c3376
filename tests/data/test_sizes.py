"""How a picture was cut goes with its pixels, from the decoder to the batch."""

import numpy as np
import pytest
import torch
from PIL import Image

from memtrain.data.images import decode_crop
from memtrain.data.view import Sizes
from tests.conftest import build_data
from tests.support.corpora import encode, sample, turned
from tests.support.tars import write_tar


def ramp(height: int, width: int) -> Image.Image:
    """Red says the column, green the row, as shares of the picture."""
    rows, columns = np.mgrid[:height, :width]
    planes = (columns * 255 / (width - 1), rows * 255 / (height - 1), np.zeros((height, width)))
    return Image.fromarray(np.stack(planes, -1).round().astype(np.uint8))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(96, 240), (250, 100), (48, 60), (640, 1000)])
def test_the_crop_begins_where_it_is_said_to_begin(size, form, flip):
    """The pixel in the crop's corner is the one that stands there in the whole picture, scaled and mirrored."""
    (height, width), target = size, 64
    options = dict(quality=100, subsampling=0) if form == "JPEG" else {}
    for crop in ((0.0, 0.0), (0.3, 0.3), (0.5, 0.5), (1.0, 1.0)):
        pixels, sizes = decode_crop(encode(ramp(height, width), form, **options), target, target, crop=crop, flip=flip)
        assert sizes[:2] == size and sizes[4:] == (target, target)
        scale = target / min(size)
        columns = (sizes.crop_left + np.arange(target) + 0.5) / (width * scale)  # shares of the picture
        rows = (sizes.crop_top + np.arange(target) + 0.5) / (height * scale)
        columns = 1 - columns if flip else columns
        allowed = 2 + 255 * 1.5 / min(size) * scale  # a pixel and a half of the scaled picture
        np.testing.assert_allclose(pixels[0, 32], 255 * columns, atol=allowed)
        np.testing.assert_allclose(pixels[1, :, 32], 255 * rows, atol=allowed)


def test_sizes_are_of_the_upright_picture_and_a_centre_crop_is_its_own_mirror_image():
    _, sizes = decode_crop(turned(ramp(60, 96)), 32, 32)
    assert sizes == Sizes(96, 60, 10, 0, 32, 32) and sizes.mirrored() == sizes
    _, sizes = decode_crop(encode(ramp(60, 120)), 30, 30, crop=(0.5, 0.2))
    assert sizes == Sizes(60, 120, 0, 6, 30, 30) and sizes.mirrored() == Sizes(60, 120, 0, 24, 30, 30)
    assert sizes.mirrored().mirrored() == sizes


def test_a_batch_says_how_each_of_its_rows_was_cut(tmp_path):
    shapes = [(96, 120), (64, 64), (80, 200)]
    pictures = [encode(ramp(*shape)) for shape in shapes]
    members = [part for n, data in enumerate(pictures) for part in sample(str(n), data)]
    write_tar(tmp_path / "0.tar", [*members, *sample("3", b"<html>")])
    data = build_data(tmp_path, canaries=0, reference=0, crop="random", flip=0.5, duplicates="none")
    rows = [(step, place, place) for step, place in zip(range(3, 7), range(4), strict=True)]
    batch = data.collate(data.views)(rows)
    assert batch.sizes.dtype == torch.float32 and batch.valid.tolist() == [True] * 3 + [False]
    for row, (step, place, _) in enumerate(rows[:3]):
        view = data.views.view(step, place)
        pixels, sizes = decode_crop(pictures[row], 64, 64, crop=view.crop, flip=view.flip)
        assert batch.sizes[row].tolist() == list(sizes) and np.array_equal(batch.images[row], pixels)
    assert batch.sizes[3].tolist() == [64, 64, 0, 0, 64, 64]  # finite, and not trained on
    assert len({tuple(row) for row in batch.sizes[:3].tolist()}) == 3
