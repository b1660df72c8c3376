"""`memtrain cache`: build data and model, encode what is missing."""

from __future__ import annotations

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from memtrain.cli.checks import check_training


def cache(cfg: DictConfig) -> None:
    if cfg.processes < 1:
        raise ValueError(f"processes must be >= 1, got {cfg.processes}")
    if cfg.data.exclude_keys is not None:
        raise ValueError(
            f"data.exclude_keys={cfg.data.exclude_keys} is for training; leave it out: a cache serves either way"
        )
    check_training(cfg)
    import torch

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
    missing = missing_shards(samples, cfg.out, made_with(model, samples), cfg.data.flip > 0, cfg.overwrite)
    check_captions(samples, missing)
    size = check_room(samples, missing, cfg.out, sample_bytes(model, samples, cfg.dtype, cfg.data.flip > 0))
    print(f"{len(samples.shards)} shards, {len(missing)} to encode: {cfg.out}, {size}", flush=True)
    if missing and cfg.processes == 1:
        _encode(0, plain, missing)
    elif missing:
        torch.multiprocessing.spawn(_encode, args=(plain, missing), nprocs=cfg.processes)


def _samples(cfg: DictConfig):
    data = instantiate(cfg.data, seed=0, canaries=0, repeats=1, reference=0, cache=cfg.out, duplicates="none")
    return data.samples


def _encode(process: int, plain: dict, missing: list[int]) -> None:
    """One process's share of the missing shards, on a GPU of its own where there are any."""
    import torch

    from memtrain.cli.terminal import quiet
    from memtrain.training.latent_cache import write_latents

    quiet()  # a process of its own has not been told
    cfg = OmegaConf.create(plain)
    torch.set_num_threads(max(1, torch.get_num_threads() // cfg.processes))  # or the processes wait for one another
    gpus = torch.cuda.device_count()
    write_latents(
        instantiate(cfg.model),
        _samples(cfg),
        missing[process :: cfg.processes],
        cfg.out,
        dtype=cfg.dtype,
        flip=cfg.data.flip > 0,
        batch_size=cfg.data.batch_size,
        num_workers=cfg.data.num_workers,
        device=torch.device(f"cuda:{process % gpus}" if gpus else "cpu"),
        progress=process == 0,
    )
