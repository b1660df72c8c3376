"""Types of every config key: a misspelt or mistyped one stops at once, with its name. Values are in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from memtrain.cli.schema_audit import Detect, Evaluate, Explain, Mitigate
from memtrain.cli.schema_sweep import Study, Sweep


@dataclass
class Shards:
    _target_: str = MISSING
    shards: Any = MISSING  # str, {shards: …, weight: …}, or a list of these
    resolution: int = MISSING
    max_aspect_ratio: float = MISSING
    bucket_multiple: int = MISSING
    crop: str = MISSING
    flip: float = MISSING
    caption: str = MISSING
    where: str | None = MISSING
    batch_size: int = MISSING
    num_workers: int = MISSING
    mix_shards: int = MISSING
    max_bad_fraction: float = MISSING
    missing_shards: str = MISSING
    duplicates: str = MISSING
    repeats_from: str | None = MISSING
    cache: str | None = MISSING
    exclude_keys: str | None = MISSING
    cache_dir: str | None = MISSING
    cache_bytes: int = MISSING


@dataclass
class Composites:
    _target_: str = MISSING
    count: int = MISSING
    resolution: int = MISSING
    batch_size: int = MISSING
    num_workers: int = MISSING


@dataclass
class StableDiffusion:
    _target_: str = MISSING
    pretrained: str = MISSING
    train_text_encoder: bool = MISSING
    gradient_checkpointing: bool = MISSING
    channels_last: bool = MISSING
    compile: bool = MISSING


@dataclass
class LowRank:
    _target_: str = MISSING
    rank: int = MISSING
    alpha: float | None = MISSING
    dropout: float = MISSING
    target_modules: Any = MISSING  # attention, linear, or a list of names
    text_encoder: bool = MISSING
    use_dora: bool = MISSING
    formats: list[str] = MISSING
    merge: bool = MISSING


@dataclass
class Threshold:
    _target_: str = MISSING
    threshold: float = MISSING
    start_step: int = MISSING


@dataclass
class Quantile:
    _target_: str = MISSING
    quantile: float = MISSING
    num_bins: int = MISSING
    half_life: int = MISSING
    warmup: int = MISSING
    start_step: int = MISSING


@dataclass
class Calibrated:
    _target_: str = MISSING
    false_positive_rate: float = MISSING
    num_bins: int = MISSING
    level_half_life: int = MISSING
    half_life: int = MISSING
    pooling: int = MISSING
    warmup: int = MISSING
    start_step: int = MISSING


@dataclass
class IetAgc:
    _target_: str = MISSING
    ratio: float = MISSING
    num_bins: int = MISSING
    half_life: int = MISSING
    warmup: int = MISSING
    start_step: int = MISSING


@dataclass
class Evidence:
    _target_: str = MISSING
    false_positive_rate: float = MISSING
    miss_rate: float = MISSING
    memory: float = MISSING
    clip: float = MISSING
    shift: float = MISSING
    shift_weight: float = MISSING
    num_bins: int = MISSING
    half_life: int = MISSING
    canary_half_life: int = MISSING
    own_visits: int = MISSING
    own_limit: float = MISSING
    copies_weight: float = MISSING
    warmup: int = MISSING
    start_step: int = MISSING


@dataclass
class ZScores:
    _target_: str = MISSING
    enter: float = MISSING
    leave: float = MISSING
    memory: float = MISSING
    min_timestep: float = MISSING
    num_bins: int = MISSING
    half_life: int = MISSING
    warmup: int = MISSING
    start_step: int = MISSING


@dataclass
class CaptionRewriting:
    _target_: str = MISSING
    probability: float = MISSING
    count: int = MISSING


@dataclass
class EmbeddingNoise:
    _target_: str = MISSING
    std: float = MISSING


@dataclass
class Ledger:
    _target_: str = MISSING
    sample: float = MISSING
    seed: int = MISSING


@dataclass
class AdamW:
    _target_: str = MISSING
    lr: float = MISSING
    betas: list[float] = MISSING
    weight_decay: float = MISSING
    eps: float = MISSING
    schedule: str = MISSING
    warmup_steps: float = MISSING
    eight_bit: bool = MISSING


@dataclass
class Trainer:
    _target_: str = MISSING
    accelerator: str = MISSING
    devices: Any = MISSING  # a number, -1 for all, a list of numbers, or auto
    num_nodes: int = MISSING
    strategy: str = MISSING
    precision: str = MISSING
    max_steps: int = MISSING
    accumulate_grad_batches: int = MISSING
    gradient_clip_val: float | None = MISSING


@dataclass
class Validation:
    _target_: str = "memtrain.callbacks.validation.Validation"
    every: int = MISSING
    samples: int = MISSING
    timesteps_per_sample: int = MISSING
    high_noise: float = MISSING
    batch_size: int = MISSING


@dataclass
class Curves:
    _target_: str = "memtrain.callbacks.curves.MemorizationCurves"
    every: int = MISSING
    high_noise: float = MISSING


@dataclass
class SampleGrid:
    _target_: str = "memtrain.callbacks.sample_grid.SampleGrid"
    every: int = MISSING
    prompts: list[str] = MISSING
    columns: int = MISSING
    num_inference_steps: int = MISSING
    guidance_scale: float = MISSING


@dataclass
class CanaryList:
    _target_: str = "memtrain.callbacks.canaries.CanaryList"
    reference: int = MISSING


@dataclass
class MemorizedTable:
    _target_: str = "memtrain.callbacks.memorized_table.MemorizedTable"
    every: int = MISSING
    samples: int = MISSING
    num_images_per_prompt: int = MISSING
    high_noise: float = MISSING
    num_inference_steps: int = MISSING
    guidance_scale: float = MISSING
    max_rmse: float = MISSING
    batch_size: int = MISSING


@dataclass
class Copies:
    _target_: str = "memtrain.callbacks.copies.Copies"
    every: int = MISSING
    watched: int = MISSING
    watched_images_per_prompt: int = MISSING
    num_images_per_prompt: int = MISSING
    reference: int = MISSING
    num_inference_steps: int = MISSING
    guidance_scale: float = MISSING
    max_rmse: float = MISSING
    batch_size: int = MISSING
    shown: int = MISSING


@dataclass
class Checkpoint:
    _target_: str = "memtrain.training.checkpoint.checkpoint"
    every: int = MISSING
    keep: int = MISSING
    folder: str = "${run_dir}/checkpoints"


@dataclass
class Export:
    _target_: str = "memtrain.callbacks.export.Export"
    dtype: str = MISSING


@dataclass
class Summary:
    _target_: str = "memtrain.callbacks.summary.Summary"


@dataclass
class Report:
    _target_: str = "memtrain.callbacks.report.Report"


@dataclass
class Progress:
    _target_: str = "memtrain.callbacks.progress.Progress"
    refresh_rate: int = MISSING


@dataclass
class Callbacks:
    """In the order in which they run: the model is saved, then what is measured, then what is made of it.

    The curves come first, so that their clock leaves out the time that the others take."""

    curves: Curves | None = field(default_factory=Curves)
    export: Export | None = field(default_factory=Export)
    canaries: CanaryList | None = field(default_factory=CanaryList)
    validation: Validation | None = field(default_factory=Validation)
    copies: Copies | None = field(default_factory=Copies)
    summary: Summary | None = field(default_factory=Summary)
    sample_grid: SampleGrid | None = field(default_factory=SampleGrid)
    memorized_table: MemorizedTable | None = field(default_factory=MemorizedTable)
    checkpoint: Checkpoint | None = field(default_factory=Checkpoint)
    report: Report | None = field(default_factory=Report)
    progress: Progress | None = field(default_factory=Progress)


@dataclass
class Canaries:
    count: int = MISSING
    repeats: int | None = MISSING
    sacrificed: int = MISSING
    sacrificed_keys: list[str] = MISSING


@dataclass
class Reference:
    count: int = MISSING
    every: int = MISSING
    batch_size: int | None = MISSING


@dataclass
class Score:
    every: int = MISSING
    every_visits: int = MISSING
    timesteps: list[int] | None = MISSING


@dataclass
class Loss:
    denominator: str = MISSING
    caption_dropout: float = MISSING
    min_snr_gamma: float | None = MISSING
    noise_offset: float = MISSING


@dataclass
class Ema:
    decay: float = MISSING


@dataclass
class Resume:
    run: str | None = MISSING
    allow: Any = MISSING  # "all", or a list of keys


@dataclass
class Train:
    name: str = MISSING
    runs_dir: str = MISSING
    run_id: str = MISSING
    run_dir: str = MISSING
    seed: int = MISSING
    resume: Resume = field(default_factory=Resume)
    ckpt_path: str | None = MISSING
    max_bad_steps: int = MISSING
    data: Any = MISSING
    model: Any = MISSING
    adapter: Any = MISSING
    exclusion: Any = MISSING
    method: Any = MISSING
    optimizer: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    ledger: Any = MISSING
    callbacks: Any = MISSING
    canaries: Canaries = field(default_factory=Canaries)
    reference: Reference = field(default_factory=Reference)
    score: Score = field(default_factory=Score)
    loss: Loss = field(default_factory=Loss)
    ema: Ema = field(default_factory=Ema)


@dataclass
class Cache:
    data: Any = MISSING
    model: Any = MISSING
    out: str = MISSING
    dtype: str = MISSING
    overwrite: bool = MISSING
    processes: int = MISSING


@dataclass
class Demo:
    out: str = MISSING
    num_samples: int = MISSING
    repeated: int = MISSING
    copies: int = MISSING
    seed: int = MISSING
    shard_size: int = MISSING


def register() -> None:
    """Make the types known to Hydra; a config names its own in its defaults list."""
    store = ConfigStore.instance().store
    for group, name, node in (
        ("schema", "train", Train),
        ("schema", "cache", Cache),
        ("schema", "demo", Demo),
        ("schema", "detect", Detect),
        ("schema", "explain", Explain),
        ("schema", "mitigate", Mitigate),
        ("schema", "evaluate", Evaluate),
        ("schema", "sweep", Sweep),
        ("schema", "study", Study),
        ("schema/data", "shards", Shards),
        ("schema/data", "composites", Composites),
        ("schema/model", "stable_diffusion", StableDiffusion),
        ("schema/adapter", "low_rank", LowRank),
        ("schema/exclusion", "threshold", Threshold),
        ("schema/exclusion", "quantile", Quantile),
        ("schema/exclusion", "calibrated", Calibrated),
        ("schema/exclusion", "iet_agc", IetAgc),
        ("schema/exclusion", "evidence", Evidence),
        ("schema/exclusion", "z_scores", ZScores),
        ("schema/method", "rewriting", CaptionRewriting),
        ("schema/method", "noise", EmbeddingNoise),
        ("schema/ledger", "ledger", Ledger),
        ("schema/optimizer", "adamw", AdamW),
        ("schema", "trainer", Trainer),
        ("schema", "callbacks", Callbacks),
    ):
        store(group=group, name=name, node=node)
