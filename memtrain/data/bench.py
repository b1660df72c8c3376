"""How fast pictures are decoded, against Pillow as it is commonly used, and how soon the first batch is there."""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, Dataset
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


def write_photos(folder: Path, shards: int, samples: int, height: int = HEIGHT, width: int = WIDTH) -> None:
    """Write shards of so many samples each, as img2dataset does: such JPEGs, and captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
            for number in range(shard * samples, (shard + 1) * samples):
                picture = jpeg(photo(number, height, width))
                tar.write({"__key__": f"{number:09d}", "jpg": picture, "txt": f"photograph {number}", "json": b"{}"})


def pillow_pipeline(data: bytes, height: int, width: int, resample: Image.Resampling) -> np.ndarray:
    """Decode, resize, centre crop -> (3, height, width) uint8, the usual way."""
    return crop_and_resize(Image.open(io.BytesIO(data)).convert("RGB"), height, width, resample)


def crop_and_resize(image: Image.Image, height: int, width: int, resample: Image.Resampling) -> np.ndarray:
    """Resize to the short side, centre crop -> (3, height, width) uint8, by Pillow."""
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


# ---- from shards to batches

LOADERS = ("webdataset, Pillow, DataLoader", "memtrain")
_BATCH = 16


@dataclass(frozen=True)
class LoadingSpeed:
    """How fast each loader makes batches of shards, medians over the rounds, on one core. `speedup`: of memtrain."""

    images: int
    rounds: int
    side: int  # px, of the squares
    images_per_second: dict[str, float]
    speedup: float
    spread: tuple[float, float]  # the smallest and the largest speedup of a round


def measure_loading(images: int, rounds: int, folder: Path, side: int = SIDE) -> LoadingSpeed:
    """Load the same shards by either loader in turn, round by round, in this process, on one thread, in CPU time.

    Args:
        images: in a round.
        folder: an empty one, for the shards.

    Raises:
        ValueError: fewer than a batch of images, or no round.
    """
    if images < _BATCH or rounds < 1:
        raise ValueError(f"a round loads {_BATCH} images at least, got {images}, and there is one, got {rounds}")
    shards, (height, width) = folder / "shards", (side * HEIGHT // SIDE, side * WIDTH // SIDE)
    write_photos(shards, 2, max(_BATCH, images // 4), height, width)
    data = from_shards(
        str(shards), side, _BATCH, 0, duplicates="none", seed=0, canaries=0, repeats=1, reference=0,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip

    def ours() -> Iterator[Any]:
        sampler = GlobalBatchSampler(data.order, _BATCH, 1, 0, 1, num_steps=images // _BATCH)
        decoder = BatchDecoder(data.samples, data.groups, data.views)
        return iter(DataLoader(Rows(), batch_sampler=sampler, collate_fn=decoder, num_workers=0))

    def theirs() -> Iterator[Any]:
        return itertools.islice(_as_open_clip(sorted(map(str, shards.glob("*.tar"))), side), images // _BATCH)

    rates: dict[str, list[float]] = {name: [] for name in LOADERS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for load in (theirs, ours):  # plugins are imported, memory is mapped
            next(load())
        for _ in range(rounds):
            for name, load in zip(LOADERS, (theirs, ours), strict=True):
                start = time.process_time()
                loaded = sum(len(batch[0] if isinstance(batch, (list, tuple)) else batch.images) for batch in load())
                rates[name].append(loaded / (time.process_time() - start))
    finally:
        torch.set_num_threads(threads)
    ratios = [fast / slow for slow, fast in zip(*rates.values(), strict=True)]
    medians = {name: median(rate) for name, rate in rates.items()}
    return LoadingSpeed(images, rounds, side, medians, median(ratios), (min(ratios), max(ratios)))


class Rows(Dataset):
    """Hands on what the sampler says, as the DataModule has it: rows are decoded a batch at a time."""

    def __getitem__(self, row: Any) -> Any:
        return row


def _as_open_clip(urls: list[str], side: int) -> Iterator[Any]:
    """Batches (images, captions) without an end, by webdataset's own stages in the order of open_clip's loader."""

    def picture(image: Image.Image) -> torch.Tensor:
        pixels = crop_and_resize(image, side, side, Image.Resampling.BICUBIC)
        return (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5  # (3, side, side), as ToTensor and Normalize

    stages = wds.DataPipeline(
        wds.ResampledShards(urls),
        wds.tarfile_to_samples(),
        wds.shuffle(64),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=picture),
        wds.to_tuple("image", "text"),
        wds.batched(_BATCH, partial=False),
    )
    return iter(wds.WebLoader(stages, batch_size=None, shuffle=False, num_workers=0))


# ---- the first batch of a large corpus


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
