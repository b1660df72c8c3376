"""The models that an audit's config names, as they were trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from memtrain.models.folders import is_file

if TYPE_CHECKING:  # torch is imported when what can be refused without it has been
    from memtrain.audit.denoiser import AsTrained, Denoiser


def as_trained(cfg: DictConfig) -> AsTrained:
    """What the files of a config's models do not say."""
    from memtrain.audit.denoiser import AsTrained

    return AsTrained(cfg.max_sequence_length, cfg.t5_padding, cfg.resolution)


def load_audited(cfg: DictConfig) -> Denoiser:
    """`model=` with its `lora=`, as `guidance_scale=` asks for it. Raises ValueError where it cannot be used."""
    from memtrain.audit.denoiser import Denoiser

    dtype = OmegaConf.select(cfg, "dtype", default="float32")
    source, config = cfg.model.pretrained, cfg.model.config
    denoiser = Denoiser.load(source, cfg.device, dtype, lora=cfg.lora, config=config, as_trained=as_trained(cfg))
    return denoiser.guided(cfg.guidance_scale)


def load_base(cfg: DictConfig) -> Denoiser:
    """`base=`, what the model was trained from."""
    from memtrain.audit.denoiser import Denoiser

    config = cfg.model.config if is_file(cfg.base) else None
    return Denoiser.load(cfg.base, cfg.device, cfg.dtype, key="base", config=config, as_trained=as_trained(cfg))


def load_judge(cfg: DictConfig) -> Denoiser | None:
    """`judge=`, of whatever family, which sees pictures of the model's size."""
    from memtrain.audit.denoiser import AsTrained, Denoiser

    if not cfg.judge:
        return None
    return Denoiser.load(cfg.judge, cfg.device, key="judge", as_trained=AsTrained(resolution=cfg.resolution))
