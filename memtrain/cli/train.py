"""`memtrain train`: build rule, callbacks, data, model, trainer; fit."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from memtrain.cli.checks import check_start, check_training
from memtrain.cli.jobs import is_job
from memtrain.core.files import written_aside
from memtrain.training.resume import Past, find_run, same_wandb_run

if TYPE_CHECKING:  # torch is imported when what can be refused without it has been
    from pytorch_lightning import Callback, Trainer
    from pytorch_lightning.loggers import Logger

    from memtrain.callbacks.guard import Guard
    from memtrain.core.exclusion import ExclusionRule
    from memtrain.data.datamodule import DataModule
    from memtrain.models.adapters import Adapter
    from memtrain.training.module import DiffusionTraining
    from memtrain.training.optimizers import OptimizerConfig
    from memtrain.training.score_memory import Scoring

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> None:
    past = _earlier(cfg)
    if past is not None and past.is_finished(cfg.trainer.max_steps, cfg.stop_early.patience):
        _let_the_first_rank_speak()
        log.info("%s is finished, at step %d: nothing to do", past.folder, past.state.finished_at)
        return
    check_start(None if past else cfg.ckpt_path)
    check_training(cfg)
    # here: what can be refused without torch, which takes seconds to import, has been
    gc.disable()  # a million objects come now, and stay: to look through them for garbage took a fifth of the start
    import pytorch_lightning as pl

    from memtrain.data.canaries_digest import canaries_digest
    from memtrain.training.checks import (
        bytes_of_samples,
        check_accelerator,
        check_disk,
        check_reference,
        check_stop_early,
    )
    from memtrain.training.signals import Signals
    from memtrain.training.stop_early import StopEarly
    from memtrain.training.stops import ended_clearly

    _let_the_first_rank_speak()
    ckpt_path = _start(cfg, past)
    check_accelerator(cfg.trainer.accelerator, cfg.trainer.devices)
    pl.seed_everything(cfg.seed, verbose=False)
    # what reads neither shards nor weights is built at once, so that its errors come first
    rule, optimizer = instantiate(cfg.exclusion), instantiate(cfg.optimizer)
    adapter, scoring = instantiate(cfg.adapter), instantiate(cfg.score)
    adapter.check_quantization(cfg.model.get("quantization"))
    signals, stop_early, looks = Signals(), StopEarly(**cfg.stop_early), _looks(cfg)
    guard = _guard(looks)
    check_reference(rule, cfg.reference.count)
    check_stop_early(stop_early.patience, cfg.reference.count, "validation" in looks)
    data = _data(cfg)
    if past is not None:
        past.check_canaries(canaries_digest(data.groups, data.samples), cfg.resume.allow)
    module = _module(cfg, rule, optimizer, adapter, scoring)
    data.check_cache(module.model.fingerprint, module.model.text_encoder_is_trained)
    of_samples, keeps_best = bytes_of_samples(rule, scoring, data.groups.num_samples), stop_early.patience is not None
    check_disk(
        Path(cfg.run_dir), module.trained_parameters(), optimizer, _checkpoints_kept(cfg), of_samples, keeps_best
    )
    trainer = _trainer(cfg, [signals, stop_early, *looks.values()], _loggers(cfg, past))
    _check_ranks(cfg, past, ckpt_path, trainer)
    _begin(cfg, past, ckpt_path, data)
    with _all_is_built(), signals, ended_clearly(trainer, module.stops):
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    guard.end(Path(cfg.run_dir), is_job())


@contextmanager
def _all_is_built() -> Iterator[None]:
    """Look for garbage again, but not among what is there by now."""
    is_mine = not gc.get_freeze_count()  # a process that makes forks has done it for them
    if is_mine:
        gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        if is_mine:
            gc.unfreeze()


def _earlier(cfg: DictConfig) -> Past | None:
    """The run to go on with. A job of -m that a scheduler starts again has the id, and so the run, that it had."""
    if is_job() and cfg.resume.run in (None, "auto"):
        return find_run(cfg.run_dir, Path(cfg.runs_dir)) if Path(cfg.run_dir, "config.yaml").exists() else None
    return find_run(cfg.resume.run, Path(cfg.runs_dir, cfg.name))


def _let_the_first_rank_speak() -> None:
    from pytorch_lightning.utilities import rank_zero_only

    for name in ("pytorch_lightning", "lightning_fabric"):  # they set their own level when imported
        logging.getLogger(name).setLevel(logging.WARNING)
    if rank_zero_only.rank > 0:
        logging.getLogger("memtrain").setLevel(logging.WARNING)  # what all ranks would say, the first says


def _start(cfg: DictConfig, past: Past | None) -> Path | None:
    """The checkpoint to begin from. A run that goes on keeps its folder, and must have its config."""
    from memtrain.training.checks import check_checkpoint, check_steps_left

    if past is None:
        path, key = check_checkpoint(cfg.ckpt_path), "ckpt_path"
    else:
        cfg.run_id, cfg.run_dir = past.folder.name, str(past.folder)
        past.check_config(OmegaConf.to_yaml(cfg, resolve=True), cfg.resume.allow)
        path, key = past.checkpoint(), "resume"
    check_steps_left(path, key, cfg.trainer.max_steps, is_new=past is None)
    return path


def _looks(cfg: DictConfig) -> dict[str, Callback]:
    """The callbacks of the config by name, in the order in which they look; the ledger first: the report reads it."""
    chosen = {"ledger": cfg.ledger, **cfg.callbacks}
    return {name: instantiate(look) for name, look in chosen.items() if look is not None}


def _guard(looks: dict[str, Callback]) -> Guard:
    """Lets the run go on where a look fails. A gap in the ledger or the checkpoints ends it: they are no looks."""
    from memtrain.callbacks.guard import Guard

    return Guard(
        callbacks=[look for name, look in looks.items() if name not in ("ledger", "checkpoint")],
        records=[look for name, look in looks.items() if name == "ledger"],
    )


def _data(cfg: DictConfig) -> DataModule:
    from memtrain.demo.foreign import foreign_pictures

    canaries, drawn = cfg.canaries, 0 if cfg.canaries.sacrificed_keys else cfg.canaries.sacrificed
    data = instantiate(
        cfg.data,
        seed=cfg.seed,
        canaries=canaries.count,
        canaries_file=canaries.file,
        repeats=canaries.repeats,
        sacrificed=drawn,
        sacrificed_keys=list(canaries.sacrificed_keys),
        foreign=foreign_pictures(canaries.source, canaries.foreign, drawn, cfg.data.resolution, cfg.seed),
        foreign_repeats=canaries.foreign_repeats,
        reference=cfg.reference.count,
    )
    data.check(cfg.trainer.accumulate_grad_batches, world_size=1)
    return data


def _module(
    cfg: DictConfig, rule: ExclusionRule, optimizer: OptimizerConfig, adapter: Adapter, scoring: Scoring
) -> DiffusionTraining:
    from memtrain.training.module import DiffusionTraining
    from memtrain.training.objective import Objective

    return DiffusionTraining(
        instantiate(cfg.model),
        rule,
        optimizer,
        instantiate(cfg.method),
        seed=cfg.seed,
        resolution=cfg.data.resolution,
        reference_every=cfg.reference.every,
        reference_batch=cfg.reference.batch_size,
        scoring=scoring,
        ema_decay=cfg.ema.decay,
        max_bad_steps=cfg.max_bad_steps,
        objective=Objective(**cfg.loss),
        adapter=adapter,
    )


def _checkpoints_kept(cfg: DictConfig) -> int:
    """How many checkpoints stay on the disk; 0: the run writes none."""
    return 0 if cfg.callbacks.checkpoint is None else cfg.callbacks.checkpoint.keep


def _loggers(cfg: DictConfig, past: Past | None) -> list[Logger]:
    """The loggers of the config; W&B goes on with the run that the past one was."""
    with same_wandb_run(past and past.state.wandb_id):
        return [instantiate(logger) for logger in (cfg.logger or {}).values()]


def _trainer(cfg: DictConfig, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    return instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=str(Path(cfg.run_dir)),
        max_epochs=-1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=cfg.callbacks.progress is not None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )


def _check_ranks(cfg: DictConfig, past: Past | None, ckpt_path: Path | None, trainer: Trainer) -> None:
    """Raises ValueError where a job has several ranks, or a run that goes on would have another global batch."""
    from memtrain.training.checks import check_job

    check_job(trainer, is_job())
    if ckpt_path is not None and past is not None:
        accumulate = trainer.accumulate_grad_batches
        past.check_global_batch(cfg.data.batch_size, accumulate, trainer.world_size, cfg.resume.allow)


def _begin(cfg: DictConfig, past: Past | None, ckpt_path: Path | None, data: DataModule) -> None:
    """Make the run's folder, with its config and its log."""
    from pytorch_lightning.utilities import rank_zero_only

    from memtrain.data.escaping import PrintableFormatter
    from memtrain.training.checks import warn_of_sacrificed

    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if rank_zero_only.rank == 0:
        run_log = logging.FileHandler(run_dir / "run.log", encoding="utf-8")
        run_log.setFormatter(PrintableFormatter())
        logging.getLogger("memtrain").addHandler(run_log)
        with written_aside(run_dir / "config.yaml") as aside:
            aside.write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        warn_of_sacrificed(data, named=len(cfg.canaries.sacrificed_keys) > 0)
        if past is not None or cfg.resume.run is not None or ckpt_path is not None:
            going_on = "going on" if past is not None else "a run of its own"
            said = f"{going_on} from {ckpt_path}" if ckpt_path else "no checkpoint, from the start"
            log.info("%s: %s", run_dir, said)
