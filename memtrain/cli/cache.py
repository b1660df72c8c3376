"""`memtrain cache`: build data and model, encode what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from memtrain.cli.checks import check_training
from memtrain.cli.distributors import distributor_of, listed
from memtrain.cli.listing import progress_bar
from memtrain.data.distribute import Local, Part

if TYPE_CHECKING:
    from memtrain.data.samples import ShardSamples
    from memtrain.models.base import DiffusionModel


def cache(cfg: DictConfig) -> None:
    if cfg.processes is not None and cfg.processes < 1:
        raise ValueError(f"processes must be >= 1, got {cfg.processes}")
    if cfg.data.exclude_keys is not None:
        raise ValueError(
            f"data.exclude_keys={cfg.data.exclude_keys} is for training; leave it out: a cache serves either way"
        )
    distributor, part = distributor_of(cfg.distributor, cfg.processes, cfg.ray.address, 1), Part.parse(cfg.part)
    check_training(cfg)
    from memtrain.training.latent_cache import (
        DTYPES,
        check_captions,
        check_room,
        made_with,
        missing_shards,
        sample_bytes,
    )

    if cfg.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {cfg.dtype}")
    plain = OmegaConf.to_container(cfg, resolve=True)
    samples, model = _samples(cfg), instantiate(cfg.model)
    header, names = made_with(model, samples), [shard.name for shard in samples.shards]
    missing = missing_shards(samples, cfg.out, header, cfg.data.flip > 0, cfg.overwrite and not cfg.merge)
    if cfg.merge and missing:
        raise ValueError(
            f"merge: {len(missing)} of {len(names)} shards are not encoded yet, such as {names[missing[0]]}; do the "
            "other parts first, or leave merge out to encode them here"
        )
    mine = [number for number in missing if number in part.of(len(names))]
    check_captions(samples, mine)
    size = check_room(samples, mine, cfg.out, sample_bytes(model, samples, mine, cfg.dtype, cfg.data.flip > 0))
    print(f"{len(names)} shards, {len(mine)} to encode: {cfg.out}, {size}", flush=True)
    prepare = partial(_encoder, plain, header)
    if distributor == Local():
        prepare = partial(Encoder, plain, header, model, samples)  # here: what has been loaded anyway
    encoding = distributor.run(Encoder.encode, mine, prepare, names.__getitem__)
    done = list(progress_bar("Encoding shards")(encoding, len(mine)))
    if left := [(names[mine[one.index]], one.failure) for one in done if one.failure]:
        raise OSError(f"{len(left)} shards could not be encoded, the same command tries them again: {listed(left)}")


def _samples(cfg: DictConfig) -> ShardSamples:
    data = instantiate(cfg.data, seed=0, canaries=0, repeats=1, reference=0, cache=cfg.out, duplicates="none")
    data.samples.missing_shards = "stop"  # a file of one that is gone would say that all of its samples are bad
    return data.samples


@dataclass
class Encoder:
    """A model and the shards whose latents it makes, of one process."""

    plain: dict  # the config
    header: dict  # what the latents are made with
    model: DiffusionModel
    samples: ShardSamples

    def encode(self, number: int) -> int:
        """Write the latents of the shard of this number."""
        import torch

        from memtrain.training.latent_cache import write_latents

        cfg = OmegaConf.create(self.plain)
        write_latents(
            self.model,
            self.samples,
            [number],
            cfg.out,
            dtype=cfg.dtype,
            flip=cfg.data.flip > 0,
            batch_size=cfg.data.batch_size,
            num_workers=cfg.data.num_workers,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            progress=False,
            header=self.header,
        )
        return number


def _encoder(plain: dict, header: dict) -> Encoder:
    """That of a process of its own."""
    from memtrain.cli.terminal import quiet

    quiet()
    cfg = OmegaConf.create(plain)
    return Encoder(plain, header, instantiate(cfg.model), _samples(cfg))
