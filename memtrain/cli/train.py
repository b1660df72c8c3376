"""`memtrain train`: build data, model, callbacks, trainer; fit."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from memtrain.cli.jobs import is_job

log = logging.getLogger(__name__)


def spelled(arguments: list[str]) -> list[str]:
    """`resume=auto` beside `resume.allow=all`: Hydra wants a key to be a value or a group of keys, not both."""
    return [re.sub(r"^resume=", "resume.run=", argument) for argument in arguments]


def train(cfg: DictConfig) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_only

    from memtrain.callbacks.guard import Guard
    from memtrain.callbacks.signals import Signals
    from memtrain.data.escaping import PrintableFormatter
    from memtrain.training.checks import (
        check_accelerator,
        check_checkpoint,
        check_disk,
        check_reference,
        warn_of_sacrificed,
    )
    from memtrain.training.module import DiffusionTraining
    from memtrain.training.objective import Objective
    from memtrain.training.resume import same_wandb_run, write_aside
    from memtrain.training.score_memory import Scoring
    from memtrain.training.stops import ended_clearly

    for name in ("pytorch_lightning", "lightning_fabric"):  # they set their own level when imported
        logging.getLogger(name).setLevel(logging.WARNING)
    if rank_zero_only.rank > 0:
        logging.getLogger("memtrain").setLevel(logging.WARNING)  # what all ranks would say, the first says
    past = _earlier(cfg)
    if past is not None:
        if past.is_finished(cfg.trainer.max_steps):
            log.info("%s is finished, at step %d: nothing to do", past.folder, past.state.finished_at)
            return
        cfg.run_id, cfg.run_dir = past.folder.name, str(past.folder)
        past.check_config(OmegaConf.to_yaml(cfg, resolve=True), cfg.resume.allow)
    ckpt_path = check_checkpoint(cfg.ckpt_path) if past is None else past.checkpoint()
    check_accelerator(cfg.trainer.accelerator, cfg.trainer.devices)
    pl.seed_everything(cfg.seed, verbose=False)
    exclusion = instantiate(cfg.exclusion)
    optimizer = instantiate(cfg.optimizer)
    # the ledger first: the report reads it
    signals = Signals()
    looks = {name: instantiate(c) for name, c in {"ledger": cfg.ledger, **cfg.callbacks}.items() if c is not None}
    guard = Guard(
        callbacks=[look for name, look in looks.items() if name not in ("ledger", "checkpoint")],
        records=[look for name, look in looks.items() if name == "ledger"],
    )
    callbacks = [signals, *looks.values()]
    check_reference(exclusion, cfg.reference.count)
    datamodule = instantiate(
        cfg.data,
        seed=cfg.seed,
        canaries=cfg.canaries.count,
        repeats=cfg.canaries.repeats,
        sacrificed=cfg.canaries.sacrificed,
        sacrificed_keys=list(cfg.canaries.sacrificed_keys),
        reference=cfg.reference.count,
    )
    datamodule.check(cfg.trainer.accumulate_grad_batches, world_size=1)
    module = DiffusionTraining(
        instantiate(cfg.model),
        exclusion,
        optimizer,
        instantiate(cfg.method),
        seed=cfg.seed,
        resolution=cfg.data.resolution,
        reference_every=cfg.reference.every,
        reference_batch=cfg.reference.batch_size,
        scoring=Scoring(**cfg.score),
        ema_decay=cfg.ema.decay,
        max_bad_steps=cfg.max_bad_steps,
        objective=Objective(**cfg.loss),
    )
    datamodule.check_cache(module.model.fingerprint, module.model.text_encoder_is_trained)
    run_dir = Path(cfg.run_dir)
    keep = 0 if cfg.callbacks.checkpoint is None else cfg.callbacks.checkpoint.keep
    check_disk(run_dir, module.trained_parameters(), keep)
    with same_wandb_run(past and past.state.wandb_id):
        loggers = [instantiate(logger) for logger in (cfg.logger or {}).values()]
    trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=str(run_dir),
        max_epochs=-1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=cfg.callbacks.progress is not None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    _check_job(trainer)
    if ckpt_path is not None and past is not None:
        ranks = trainer.world_size
        past.check_global_batch(cfg.data.batch_size, trainer.accumulate_grad_batches, ranks, cfg.resume.allow)
    run_dir.mkdir(parents=True, exist_ok=True)
    if rank_zero_only.rank == 0:
        run_log = logging.FileHandler(run_dir / "run.log", encoding="utf-8")
        run_log.setFormatter(PrintableFormatter())
        logging.getLogger("memtrain").addHandler(run_log)
        write_aside(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        warn_of_sacrificed(datamodule, named=len(cfg.canaries.sacrificed_keys) > 0)
        if past is not None or cfg.resume.run is not None:
            log.info("%s: %s", run_dir, f"going on from {ckpt_path}" if ckpt_path else "no checkpoint, from the start")
    with signals, ended_clearly(trainer, module.stops):
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    guard.end(run_dir, is_job())


def _earlier(cfg: DictConfig):
    """The run to go on with. A job of -m that a scheduler starts again has the id, and so the run, that it had."""
    from memtrain.training.resume import find_run

    if is_job() and cfg.resume.run in (None, "auto"):
        return find_run(cfg.run_dir, Path(cfg.runs_dir)) if Path(cfg.run_dir, "config.yaml").exists() else None
    return find_run(cfg.resume.run, Path(cfg.runs_dir, cfg.name))


def _check_job(trainer) -> None:
    """A job of -m has one rank: Lightning would start the others as the whole command, all jobs again."""
    if not is_job() or trainer.world_size == 1:
        return
    if not trainer.strategy.cluster_environment.creates_processes_externally:
        raise ValueError(
            f"train -m starts jobs of one rank, got {trainer.world_size}; say trainer.devices=1, or use "
            "memtrain sweep, whose trials are programs of their own"
        )
