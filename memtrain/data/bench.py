"""How fast pictures are decoded, against Pillow as it is commonly used, and how soon the first batch is there."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from webdataset import TarWriter

from memtrain.data.batches import BatchDecoder
from memtrain.data.datamodule import from_shards
from memtrain.data.images import decode_image
from memtrain.data.index import write_index
from memtrain.data.order import GlobalBatchSampler

HEIGHT, WIDTH, SIDE = 720, 640, 512  # px, of the JPEGs and of the square that is wanted


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """Noise with the falling spectrum of photographs, 1 / f^a, and pale colours: (height, width, 3) uint8.

    a is drawn from 1.4 (foliage) to 1.8 (portraits). At quality 95 a JPEG of that takes a third of a byte a
    pixel, as one of a photograph does; more detail costs all pipelines the same and lowers their ratio.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no offset
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency ** rng.uniform(1.4, 1.8)
    planes = np.fft.irfft2(spectrum, s=(height, width))
    red, green, blue = planes / planes.std(axis=(1, 2), keepdims=True)
    levels = [120 + 55 * green + 12 * plane for plane in (red, green, blue)]
    # three planes (height, width) -> (height, width, 3)
    return np.stack(levels, axis=-1).clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    """Pixels (h, w, 3) or (h, w), uint8 -> a JPEG of quality 95, img2dataset's. `options` are Pillow's."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **({"quality": 95} | options))
    return out.getvalue()


def pillow_pipeline(data: bytes, height: int, width: int, resample: Image.Resampling) -> np.ndarray:
    """Decode, resize, centre crop -> (3, height, width) uint8, the usual way."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (height, width, 3) -> (3, height, width)


PIPELINES: dict[str, Callable[[bytes, int, int], np.ndarray]] = {
    "Pillow, lanczos": partial(pillow_pipeline, resample=Image.Resampling.LANCZOS),
    "Pillow, bicubic": partial(pillow_pipeline, resample=Image.Resampling.BICUBIC),
    "memtrain": decode_image,
}


@dataclass(frozen=True)
class DecodingSpeed:
    """How fast each pipeline decodes, medians over the rounds. `speedup`: of memtrain, within the same round."""

    images: int
    rounds: int
    mean_bytes: float
    images_per_second: dict[str, float]  # on one core
    speedup: dict[str, float]


def measure_decoding(images: int, rounds: int) -> DecodingSpeed:
    """Decode the same JPEGs by every pipeline in turn, round by round, on one thread, in CPU time.

    Raises:
        ValueError: fewer than one picture or round.
    """
    for name, value in (("--images", images), ("--rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    pictures = [jpeg(photo(seed, HEIGHT, WIDTH)) for seed in range(images)]
    rates: dict[str, list[float]] = {name: [] for name in PIPELINES}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for pipeline in PIPELINES.values():  # plugins are imported, memory is mapped
            _seconds(pipeline, pictures[:1])
        for _ in range(rounds):
            for name, pipeline in PIPELINES.items():
                rates[name].append(images / _seconds(pipeline, pictures))
    finally:
        torch.set_num_threads(threads)
    speedup = {
        name: median(fast / slow for fast, slow in zip(rates["memtrain"], rates[name], strict=True))
        for name in PIPELINES
        if name != "memtrain"
    }
    medians = {name: median(rate) for name, rate in rates.items()}
    return DecodingSpeed(images, rounds, mean(map(len, pictures)), medians, speedup)


def _seconds(pipeline: Callable[[bytes, int, int], np.ndarray], pictures: list[bytes]) -> float:
    """CPU time in which a pipeline decodes these pictures."""
    start = time.process_time()
    for data in pictures:
        pipeline(data, SIDE, SIDE)
    return time.process_time() - start


@dataclass(frozen=True)
class StartUp:
    """How long a start takes. `resident_bytes`: what the process holds more, once the first batch is there."""

    shards: int
    samples: int
    corpus_seconds: float
    first_batch_seconds: float
    resident_bytes: int


def measure_start_up(shards: int, samples_per_shard: int, folder: Path) -> StartUp:
    """Time a start, from shards with their index files to the first batch; the shards are links to a single one.

    Args:
        folder: an empty folder, for a shard of `samples_per_shard` small pictures and the links.

    Raises:
        ValueError: fewer than one shard or sample.
    """
    for name, value in (("--shards", shards), ("--samples", samples_per_shard)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    linked_shards(shards, samples_per_shard, folder)
    before, start = _resident_bytes(), time.perf_counter()
    reference = min(500, samples_per_shard)
    data = from_shards(
        str(folder), 64, 8, 0, duplicates="none",  # they are all duplicates here
        seed=0, canaries=24, repeats=100, reference=reference,
    )  # fmt: skip
    corpus = time.perf_counter() - start
    sampler = GlobalBatchSampler(data.order, 8, 1, 0, 1, num_steps=1)
    BatchDecoder(data.samples, data.groups, data.views)(next(iter(sampler)))
    first_batch = time.perf_counter() - start
    return StartUp(shards, data.groups.num_samples, corpus, first_batch, _resident_bytes() - before)


def linked_shards(shards: int, samples_per_shard: int, folder: Path) -> None:
    """Write a shard of small pictures, its index and a parquet with a column width, and link all others to them.

    Nine in ten of the widths are 100 or above.
    """
    first = folder / "00000.tar"
    picture = jpeg(photo(0, 64, 64))
    keys = [f"{row:09d}" for row in range(samples_per_shard)]
    with TarWriter(str(first), mtime=0) as tar:
        for key in keys:
            tar.write({"__key__": key, "jpg": picture, "txt": "a caption", "json": b"{}"})
    write_index(first)
    widths = np.random.default_rng(0).integers(90, 190, samples_per_shard)
    pq.write_table(pa.table({"key": keys, "width": widths}), first.with_suffix(".parquet"))
    for number in range(1, shards):
        for suffix in (".tar", ".tar.index.npy", ".tar.index.json", ".parquet"):
            os.link(folder / f"00000{suffix}", folder / f"{number:05d}{suffix}")


def _resident_bytes() -> int:
    """Memory that this process holds, as Linux counts it, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
