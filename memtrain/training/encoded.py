"""Samples as latents, to be looked at again and again outside the order of training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memtrain.data.batches import Batch
from memtrain.data.datamodule import DataModule
from memtrain.data.images import BadSample
from memtrain.data.remote import ShardMissing
from memtrain.models.base import DiffusionModel

log = logging.getLogger(__name__)

Positions = Sequence[int] | np.ndarray


class EncodedSamples(NamedTuple):
    """N samples, seen straight."""

    latents: Tensor  # (N, C, h, w) means, on the CPU
    positions: Tensor  # (N,), on the device
    captions: list[str]
    sizes: Tensor  # (N, 6), see `memtrain.data.view.Sizes`, on the device


@torch.no_grad()
def encode_samples(
    model: DiffusionModel, data: DataModule, positions: Positions, batch_size: int = 32
) -> EncodedSamples:
    """Encode the samples at these positions, but those that cannot be read."""
    device = model.device
    latents, index, captions, sizes = [], [], [], []
    for first in range(0, len(positions), batch_size):
        batch = data.decode(positions[first : first + batch_size])
        valid = batch.valid
        images = batch.images[valid].to(device)
        if len(images) == 0:
            continue
        mean, std = model.encode_posterior(images)
        latents.append(model.sample_latents(mean, std, torch.zeros_like(std)).cpu())
        index.append(batch.sample_index[valid])
        assert batch.sizes is not None  # it was made of pictures
        sizes.append(batch.sizes[valid])
        captions += [caption for caption, ok in zip(batch.captions, valid.tolist(), strict=True) if ok]
    if not index:
        shape = model.latent_shape(*data.samples.sizes[0])
        no_index, no_sizes = torch.zeros(0, dtype=torch.long, device=device), torch.zeros(0, 6, device=device)
        return EncodedSamples(torch.zeros(0, *shape), no_index, [], no_sizes)
    return EncodedSamples(torch.cat(latents), torch.cat(index).to(device), captions, torch.cat(sizes).to(device))


@torch.no_grad()
def encode_pictures(
    model: DiffusionModel, data: DataModule, positions: Positions, batch_size: int = 32
) -> tuple[Tensor, np.ndarray]:
    """The mean latents (N, C, h, w) of the samples at these positions, but those that cannot be read, and who these
    are (N,): from the cache, in the precision that it holds, where there is one.

    Raises:
        ShardMissing: a shard is gone, or a file of the cache.
    """
    if data.cache is None:
        samples = encode_samples(model, data, positions, batch_size)
        return samples.latents, samples.positions.cpu().numpy()
    found, read = [], []
    for position in positions:
        try:
            found.append(torch.from_numpy(data.cache.get(int(position), flip=False).columns["posterior"]))
            read.append(int(position))
        except BadSample as problem:
            log.warning("bad sample %s: %s", data.samples.key(int(position)), problem)
        except ValueError as error:  # its file is gone, or another by now
            raise ShardMissing(str(error)) from error
    if not found:
        return torch.zeros(0, *model.latent_shape(*data.samples.sizes[0])), np.zeros(0, np.int64)
    mean, std = torch.stack(found).to(model.device).unbind(1)  # (N, C, h, w) each
    return model.sample_latents(mean, std, torch.zeros_like(std)).cpu(), np.array(read)


@torch.no_grad()
def encode_once(model: DiffusionModel, data: DataModule, positions: Positions, batch_size: int = 32) -> Batch:
    """Encode samples of one size into one batch on the CPU, posteriors in place of pictures; bad ones are reported.

    For samples that look the same at every visit. Where a shard is gone, the batch says so, as one of training does.
    """
    decode, device = data.collate(data.views), model.device
    parts = []
    for first in range(0, len(positions), batch_size):
        part = decode([(0, 0, int(position)) for position in positions[first : first + batch_size]])
        data.report(part)
        # mean and standard deviation, (B, C, h, w) each -> (B, 2, C, h, w), as from a cache
        posterior = torch.stack(model.encode_posterior(part.images.to(device)), dim=1).cpu()
        parts.append(replace(part, images=part.images.new_zeros(len(part), 0), posterior=posterior))
    # the parts, one after the other: every tensor of a batch has its rows first
    names = [field.name for field in fields(Batch) if isinstance(getattr(parts[0], field.name), Tensor)]
    whole: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    captions = [caption for part in parts for caption in part.captions]
    missing = next((part.missing for part in parts if part.missing is not None), None)
    return Batch(captions=captions, problems=[], missing=missing, **whole)


def rows_of(batch: Batch, rows: Sequence[int], places: Sequence[int]) -> Batch:
    """The batch of these rows of another one, each at a place of its own in the global batch; a row may come twice."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    chosen: dict[str, Any] = {name: value[list(rows)] for name, value in values.items() if isinstance(value, Tensor)}
    chosen |= {"captions": [batch.captions[row] for row in rows], "problems": []}
    return replace(batch, **(chosen | {"place": torch.tensor(list(places), dtype=torch.long)}))
