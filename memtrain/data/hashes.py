"""Hashes of images, a record a sample of a shard: equal bytes and equal looks can be told without the pictures.

They lie beside the index that `memtrain shards index` writes, else in the cache folder, each computed once for a
state of its shard.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pdqhash

from memtrain.data.images import BadSample, decode_image, picture_shape
from memtrain.data.kept import read_array

HASHES = np.dtype(
    [
        ("sha256", "<u8"),  # of the image's bytes, the first 8 bytes
        ("pdq", "<u2", 16),  # PDQ, 256 bits, as words; 0 where the image cannot be decoded
        ("quality", "u1"),  # of the PDQ, 0 to 100
    ]
)
MIN_QUALITY = 50  # of 100, of the PDQ: below, a picture has no features to compare
_SIDE = 256  # px, short side of what is hashed; PDQ itself goes down to 64


def perceptual_hash(data: bytes) -> tuple[bytes, int]:
    """PDQ of the whole picture, 32 bytes, and its quality, 0 to 100. Raises BadSample."""
    shape = picture_shape(data)
    scale = min(1.0, _SIDE / min(shape))
    image = decode_image(data, *(max(1, round(side * scale)) for side in shape))
    bits, quality = pdqhash.compute(np.ascontiguousarray(image.transpose(1, 2, 0)))  # (3, h, w) -> (h, w, 3)
    return np.packbits(bits.astype(np.uint8)).tobytes(), int(quality)


def image_hashes(images: Iterable[bytes]) -> np.ndarray:
    """Hashes of images, given as the bytes of their files. (N,) of `HASHES`

    An image that cannot be decoded equals only those of the same bytes.
    """
    rows = []
    for data in images:
        try:
            pdq, quality = perceptual_hash(data)
        except BadSample:
            pdq, quality = bytes(32), 0
        digest = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
        rows.append((digest, np.frombuffer(pdq, np.uint16), quality))
    return np.array(rows, dtype=HASHES)


def shard_hashes(shard: Path, extents: np.ndarray) -> np.ndarray:
    """Hashes of a shard's images, which lie at these (offset, size). (N,) of `HASHES`.

    Raises:
        OSError: the shard cannot be read, or ends before.
    """
    with shard.open("rb") as file:
        end = os.fstat(file.fileno()).st_size

        def read(extent: np.void) -> bytes:
            offset, size = int(extent["offset"]), int(extent["size"])
            if min(offset, size) < 0 or size > end - offset:
                raise OSError("it ends before what its index names")
            file.seek(offset)
            return file.read(size)

        return image_hashes(map(read, extents))


def read_hashes(path: str | Path, count: int) -> np.ndarray | None:
    """Hashes of so many images, mapped into memory; None where there is no such file, or it is damaged."""
    found = read_array(path)
    return found if found is not None and found.dtype == HASHES and found.shape == (count,) else None
