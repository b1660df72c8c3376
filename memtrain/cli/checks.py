"""What a command refuses before anything that takes long is imported: paths at which there is nothing.

The rules are those of the rooms, whose code asks again where it opens the file.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from memtrain.data.paths import CHECKPOINT, FORGET, GROUPS, KEYS, LISTED, SAMPLES, TORCHSCRIPT, check_file
from memtrain.data.sources import find_sources
from memtrain.models.folders import AUDITED, CLIP, check_folder, check_lora, check_pipeline, is_file, trained

# one's own data and models have rules of their own
_SHARDS = "memtrain.data.datamodule.from_shards"
_PRETRAINED = "memtrain.models.pretrained."


def check_training(cfg: DictConfig) -> None:
    """Data and model of `train` and `cache`. Raises ValueError."""
    if cfg.data._target_ == _SHARDS:
        check_shards(cfg)
        _file("data.exclude_keys", cfg.data.exclude_keys, KEYS)
        _file("data.repeats_from", cfg.data.repeats_from, GROUPS)
    if "canaries" in cfg:
        _file("canaries.file", cfg.canaries.file, LISTED)
    if cfg.model._target_.startswith(_PRETRAINED):
        check_pipeline("model.pretrained", cfg.model.pretrained, trained(cfg.model.family), cfg.model.config)


def check_shards(cfg: DictConfig) -> None:
    """Raises ValueError where `data.shards` names nothing."""
    find_sources(OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)["shards"])


def check_start(ckpt_path: str | None) -> None:
    _file("ckpt_path", ckpt_path, CHECKPOINT)


def check_detection(cfg: DictConfig) -> None:
    _check_audited(cfg)
    _file("embedding", cfg.embedding, TORCHSCRIPT)
    if cfg.base is not None:
        check_pipeline("base", cfg.base, AUDITED, cfg.model.config if is_file(cfg.base) else None)
        if "anchored" not in cfg.scores:
            raise ValueError(f"base={cfg.base} is for the anchored score; say scores=[anchored], or leave it out")


def check_explanation(cfg: DictConfig) -> None:
    _check_audited(cfg)


def check_mitigation(cfg: DictConfig) -> None:
    _check_audited(cfg)
    if cfg.data.shards is not None:
        check_shards(cfg)
    if cfg.judge:
        check_pipeline("judge", cfg.judge, AUDITED)
    if cfg.clip:
        check_folder("clip", cfg.clip, CLIP)


def check_repair(cfg: DictConfig) -> None:
    _check_audited(cfg)
    if cfg.weights not in ("lora", "all"):
        raise ValueError(f"weights must be lora or all, got {cfg.weights}")
    for key, least in (("keep.count", 1), ("watched", 0), ("rank", 1)):
        value = OmegaConf.select(cfg, key)
        if value < least:
            raise ValueError(f"{key} must be >= {least}, got {value}")
    _file("forget", cfg.forget.list, FORGET)
    for key in ("data", "keep"):
        if cfg[key].shards is not None:
            find_sources(OmegaConf.to_container(cfg[key], resolve=True)["shards"])
    _file("keep.captions", cfg.keep.captions, "name a list of captions, or leave it out")
    _file("reference", cfg.reference, "name a list of captions, or leave it out")
    out = Path(cfg.out).expanduser()
    if out.exists() and any(one.name != "repair" for one in out.iterdir()):
        raise ValueError(f"out={cfg.out} is there and holds other things; delete it or choose another")


def check_evaluation(cfg: DictConfig, models: list[str], loras: list[str | None]) -> None:
    for model in models:
        check_pipeline("model", model, AUDITED, cfg.config if is_file(model) else None)
    for lora in loras:
        if lora is not None:
            check_lora("lora", lora)
    check_shards(cfg)
    _file("samples", cfg.samples.file, SAMPLES)
    _file("sscd", cfg.sscd, TORCHSCRIPT)
    _file("fid", cfg.fid, TORCHSCRIPT)
    if cfg.clip:
        check_folder("clip", cfg.clip, CLIP)
    if cfg.judge:
        check_pipeline("judge", cfg.judge, AUDITED)


def check_new_file(option: str, file: Path) -> None:
    """Raises ValueError where this file is there, or its folder is not."""
    if file.exists():
        raise ValueError(f"{option}={file} is there already; delete it or choose another")
    check_folder_of(option, file)


def check_folder_of(option: str, file: Path) -> None:
    """Raises ValueError where the folder that this file is to lie in is not there."""
    if not file.parent.is_dir():
        raise ValueError(f"{option}={file}: there is no folder {file.parent}; make it first")


def _check_audited(cfg: DictConfig) -> None:
    check_pipeline("model", cfg.model.pretrained, AUDITED, cfg.model.config)
    if cfg.lora is not None:
        check_lora("lora", cfg.lora)


def _file(key: str, path: str | None, remedy: str) -> None:
    if path:
        check_file(key, path, remedy)
