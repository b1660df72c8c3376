"""`memtrain cache`: encode a corpus once, so that training need not decode and encode it every epoch."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from memtrain.core.files import written_aside
from memtrain.data.batches import Batch, BatchDecoder
from memtrain.data.datamodule import DataModule
from memtrain.data.foreign import LatentsWithForeign, WithForeign
from memtrain.data.groups import Groups
from memtrain.data.images import BadSample
from memtrain.data.latents import (
    HIDDEN_BOUNDS,
    TOKENS,
    CachedSample,
    cache_path,
    difference,
    is_of_state,
    read_header,
    shard_state,
)
from memtrain.data.remote import ShardMissing
from memtrain.data.samples import ShardSamples
from memtrain.models.base import DiffusionModel

log = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "float32": torch.float32}
_CAPTION_BYTES = 100  # of a usual one
_CAPTIONS_ASKED = 32  # of a corpus, how many tokens theirs are
_ROW_BYTES = 8 + 1  # where its caption ends, whether it is valid


def made_with(model: DiffusionModel, samples: ShardSamples) -> dict:
    """What decides the numbers in a cache; see `memtrain.data.latents.MADE_WITH`."""
    return {**model.fingerprint(), **samples.described()}


def missing_shards(samples: ShardSamples, out: str, header: dict, flip: bool, overwrite: bool) -> list[int]:
    """The shards whose latents are still to be computed.

    Raises:
        ValueError: a file of another make is there, and `overwrite` does not say to replace it.
    """
    missing = []
    for number, shard in enumerate(samples.shards):
        path = cache_path(out, shard.url, shard.name)
        if path.exists() and not overwrite:
            found = read_header(path)
            unlike = difference(found, header) or (
                None if is_of_state(found, shard_state(samples, number)) else "another state of its shard"
            )
            unlike = unlike or ("no mirror images" if flip and not found.get("flip") else None)
            if unlike:
                raise ValueError(f"{path} was made with {unlike}; use overwrite=true or another out=FOLDER")
        else:
            missing.append(number)
    return missing


def check_captions(samples: ShardSamples, numbers: Iterable[int]) -> None:
    """Raises ValueError where a shard's first sample has several captions: a cache holds one embedding a sample."""
    for number in numbers:
        if samples.counts[number] and len(samples.captions(int(samples.rows.starts[number]))) > 1:
            raise ValueError(
                f"data.caption={samples.caption} is a list of captions in {samples.shards[number].name}, and a cache "
                "holds one a sample; choose a column with one, or train without data.cache"
            )


@torch.no_grad()
def sample_bytes(model: DiffusionModel, samples: ShardSamples, numbers: Sequence[int], dtype: str, flip: bool) -> int:
    """What a sample takes in a cache: of the captions' lengths, the mean of some in the shards of these numbers."""
    latents = math.prod(model.latent_shape(*samples.sizes[0]))
    told = model.encode(_some_captions(samples, numbers) or ["a caption"])
    stored = 2 * latents * (2 if flip else 1) + int(lengths(told.hidden).float().mean() * told.hidden.shape[2])
    stored += 0 if told.pooled is None else told.pooled[0].numel()
    sizes = 0 if told.time_ids is None else told.time_ids[0].numel() * torch.int32.itemsize
    return stored * DTYPES[dtype].itemsize + sizes + _CAPTION_BYTES + _ROW_BYTES


def _some_captions(samples: ShardSamples, numbers: Sequence[int]) -> list[str]:
    """Captions evenly spread over the shards of these numbers; what cannot be read is left out."""
    ends = samples.counts[list(numbers)].cumsum()
    captions = []
    for place in np.unique(np.linspace(0, ends[-1] - 1, _CAPTIONS_ASKED).astype(int)) if ends.any() else []:
        shard = int(np.searchsorted(ends, place, side="right"))
        before = int(ends[shard - 1]) if shard else 0
        with suppress(BadSample):
            captions += samples.captions(int(samples.rows.starts[numbers[shard]]) + int(place) - before)[:1]
    return captions


def check_room(samples: ShardSamples, numbers: Iterable[int], out: str, bytes_of_one: int) -> str:
    """Say how large the caches of these shards will be. What is overwritten makes room, file by file.

    Raises:
        OSError: a disk has less free than they take.
    """
    by_disk: dict[int, list[tuple[Path, int]]] = {}  # of each: a file, and by how much it grows
    count = 0
    for number in numbers:
        shard = samples.shards[number]
        path, rows = cache_path(out, shard.url, shard.name), int(samples.counts[number])
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        grows = rows * bytes_of_one - (path.stat().st_size if path.exists() else 0)
        by_disk.setdefault(folder.stat().st_dev, []).append((folder, grows))
        count += rows
    said = f"{count:,} samples of {bytes_of_one / 1e3:,.1f} kB, {count * bytes_of_one / 1e9:,.2f} GB in all"
    for files in by_disk.values():
        folder, grows = files[0][0], sum(grows for _, grows in files)
        free = shutil.disk_usage(folder).free
        if grows > free:
            raise OSError(
                f"the disk is too full for the cache: {said}, and {folder} has {free / 1e9:,.2f} GB free; free some "
                "space, or name another out=FOLDER"
            )
    return said


def write_latents(
    model: DiffusionModel,
    samples: ShardSamples,
    numbers: Iterable[int],
    out: str,
    *,
    dtype: str,
    flip: bool,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    progress: bool,
    header: dict | None = None,
) -> None:
    """Encode the shards of these numbers into a file each, written aside and renamed: what is there is whole.

    Raises ShardMissing where one is gone while it is read.

    `header`: what `made_with` says of model and samples, where it has been asked already: it reads all weights.
    """
    header = header or made_with(model, samples)
    model.to(device)
    numbers = list(numbers)
    for number in track(numbers, "Encoding shards", disable=not progress):
        shard = samples.shards[number]
        path = cache_path(out, shard.url, shard.name)
        positions = range(samples.rows.starts[number], samples.rows.ends[number])
        loader = DataLoader(
            _Rows(positions),
            batch_size=batch_size,
            collate_fn=BatchDecoder(samples, Groups(len(samples)), views=None),
            num_workers=num_workers,
        )
        tensors = _encode(model, loader, len(positions), flip, DTYPES[dtype], device)
        path.parent.mkdir(parents=True, exist_ok=True)
        said = {**header, "flip": flip, **shard_state(samples, number)}
        if "hidden" in tensors:  # an empty shard has none
            said[TOKENS] = tensors["hidden"].shape[1]
            tensors |= without_last_zeros(tensors["hidden"])
        with written_aside(path, shared=True) as aside:
            save_file(tensors, aside, metadata={"memtrain": json.dumps(said)})


@torch.no_grad()
def _encode(
    model: DiffusionModel, loader: Iterable[Batch], count: int, flip: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Encode the rows of one shard into the tensors of its file; those that cannot be decoded are not valid.

    N rows: posterior and posterior_flipped (N, 2, C, h, w), hidden (N, L, D), valid (N,) bool, of families that take
    them pooled (N, P) and sizes (N, 6) int32, and the captions as one text in UTF-8, row n between caption_bounds[n]
    and caption_bounds[n + 1].
    """
    columns: dict[str, list[torch.Tensor]] = {}
    captions: list[bytes] = []

    def keep(name: str, rows: torch.Tensor) -> None:
        columns.setdefault(name, []).append(rows.cpu())

    for batch in loader:
        if batch.missing is not None:  # its rows are no bad samples, and half a shard has no file
            raise ShardMissing(batch.missing)
        for key, why in batch.problems:
            log.warning("bad sample %s: %s", key, why)
        images = batch.images.to(device)
        # mean and standard deviation, (B, C, h, w) each -> (B, 2, C, h, w)
        keep("posterior", torch.stack(model.encode_posterior(images), dim=1).to(dtype))
        if flip:
            keep("posterior_flipped", torch.stack(model.encode_posterior(images.flip(-1)), dim=1).to(dtype))
        encoded = model.encode(batch.captions)
        keep("hidden", encoded.hidden.to(dtype))
        if encoded.pooled is not None:
            keep("pooled", encoded.pooled.to(dtype))
        if encoded.time_ids is not None and batch.sizes is not None:
            keep("sizes", batch.sizes.int())
        keep("valid", batch.valid)
        captions += [caption.encode("utf-8", "replace") for caption in batch.captions]
    tensors = {name: torch.cat(rows).contiguous() for name, rows in columns.items()}
    assert all(len(rows) == count for rows in tensors.values())
    bounds = np.cumsum([0, *map(len, captions)])
    tensors["caption_bounds"] = torch.from_numpy(bounds.astype(np.int64))
    text = bytearray(b"".join(captions) + b"\0")  # safetensors refuses a slice that starts at the end
    tensors["captions"] = torch.frombuffer(text, dtype=torch.uint8)
    return tensors


@torch.no_grad()
def with_foreign_latents(model: DiffusionModel, data: DataModule) -> LatentsWithForeign:
    """The cached latents of a run, and behind them those of its foreign pictures, which no cache holds.

    Encoded in float32, and the caption in full, as a cache gives it.
    """
    cache, samples = data.cache, data.samples
    assert cache is not None and isinstance(samples, WithForeign)
    batch = data.decode(np.arange(samples.first, samples.first + samples.count))
    tensors = _encode(model, [batch], samples.count, True, torch.float32, model.device)

    def sample(row: int, posterior: str) -> CachedSample:
        stored = {name: posterior if name == "posterior" else name for name in cache.shapes()}
        columns = {name: tensors[column][row].float().numpy() for name, column in stored.items()}
        return CachedSample(columns, batch.captions[row])

    encoded = [(sample(row, "posterior"), sample(row, "posterior_flipped")) for row in range(samples.count)]
    return LatentsWithForeign(cache, samples, encoded)


def without_last_zeros(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """(N, L, D) embeddings as a file holds them: each without the zeros at its end, which stand for padding.

    Where all are of l tokens, hidden (N, l, D); else hidden (sum of l, D) and where the rows begin and end, (N + 1,).
    A caption's own tokens alone are left of a T5 that pads with zeros; of one that encodes padding none is left out:
    without a mask, what stands for padding depends on the caption, and the network attends to all of it.
    """
    kept = lengths(hidden)
    if kept.unique().numel() == 1:
        return {"hidden": hidden[:, : int(kept[0])].contiguous()}
    rows = torch.cat([row[:length] for row, length in zip(hidden, kept.tolist(), strict=True)])
    return {"hidden": rows, HIDDEN_BOUNDS: torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])}


def lengths(hidden: torch.Tensor) -> torch.Tensor:
    """(N,) int64: tokens of each of (N, L, D) embeddings up to the last that is not zeros; one at least."""
    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    return (hidden.ne(0).any(dim=2) * places).amax(dim=1).clamp(min=1)


class _Rows(Dataset[tuple[int, int, int]]):
    """A dataset of the rows that `BatchDecoder` takes: (step, place, position), one for each position."""

    def __init__(self, positions: range):
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, row: int) -> tuple[int, int, int]:
        return 0, row, self.positions[row]
