"""Types of the keys of detect, explain, mitigate and evaluate. Values are in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Pretrained:
    pretrained: str = MISSING


@dataclass
class Detect:
    model: Pretrained = field(default_factory=Pretrained)
    lora: str | None = MISSING
    prompts: str | None = MISSING
    memorized: str | None = MISSING
    other: str | None = MISSING
    column: str | None = MISSING
    label: str | None = MISSING
    group: str | None = MISSING
    scores: list[str] = MISSING
    embedding: str | None = MISSING
    num_images_per_prompt: int = MISSING
    num_scored_steps: int = MISSING
    num_inference_steps: int = MISSING
    guidance_scale: float = MISSING
    seed: int = MISSING
    max_fpr: Any = MISSING  # a share, or a list of them
    threshold: float | None = MISSING
    out: str = MISSING
    overwrite: bool = MISSING
    top: int = MISSING
    batch_size: int = MISSING
    device: str | None = MISSING
    dtype: str = MISSING


@dataclass
class Explain:
    model: Pretrained = field(default_factory=Pretrained)
    lora: str | None = MISSING
    prompt: str | None = MISSING
    prompts: str | None = MISSING
    column: str | None = MISSING
    label: str | None = MISSING
    suggest: bool = MISSING
    suggest_words: int = MISSING
    check: bool = MISSING
    num_images_per_prompt: int = MISSING
    steps: list[int] = MISSING
    num_inference_steps: int = MISSING
    guidance_scale: float = MISSING
    seed: int = MISSING
    out: str = MISSING
    charts: int = MISSING
    shown: int = MISSING
    batch_size: int = MISSING
    device: str | None = MISSING
    dtype: str = MISSING


@dataclass
class MitigateData:
    shards: str | None = MISSING


@dataclass
class Mitigate:
    model: Pretrained = field(default_factory=Pretrained)
    lora: str | None = MISSING
    prompt: str | None = MISSING
    prompts: str | None = MISSING
    column: str | None = MISSING
    label: str | None = MISSING
    method: Any = MISSING  # names: one, a list or all; and each method's settings
    target: Any = MISSING  # a score, or q0.1
    reference: str | None = MISSING
    data: MitigateData = field(default_factory=MitigateData)
    max_rmse: float = MISSING
    judge: str | None = MISSING
    clip: str | None = MISSING
    num_images_per_prompt: int = MISSING
    num_inference_steps: int = MISSING
    guidance_scale: float = MISSING
    seed: int = MISSING
    out: str = MISSING
    shown: int = MISSING
    batch_size: int = MISSING
    device: str | None = MISSING
    dtype: str = MISSING


@dataclass
class EvaluateData:
    shards: Any = MISSING
    caption: str = MISSING
    where: str | None = MISSING
    cache_dir: str | None = MISSING


@dataclass
class EvaluateSamples:
    file: str | None = MISSING
    group: str = MISSING
    count: int = MISSING


@dataclass
class Evaluate:
    models: Any = MISSING
    lora: Any = MISSING  # str, or a list with one for each model, or null
    data: EvaluateData = field(default_factory=EvaluateData)
    samples: EvaluateSamples = field(default_factory=EvaluateSamples)
    num_images_per_prompt: int = MISSING
    num_inference_steps: int = MISSING
    guidance_scale: float = MISSING
    timesteps_per_sample: int = MISSING
    sscd: str | None = MISSING
    sscd_resize: str = MISSING
    min_sscd: float = MISSING
    max_rmse: float = MISSING
    clip: str | None = MISSING
    fid: str | None = MISSING
    fid_samples: int = MISSING
    gallery: int = MISSING
    seed: int = MISSING
    batch_size: int = MISSING
    device: str | None = MISSING
    dtype: str = MISSING
    out: str = MISSING
