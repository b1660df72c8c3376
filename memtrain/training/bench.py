"""What scoring costs: the time of whole training steps with it and without, interleaved within one run."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from memtrain.core.binned_rules import IetAgc
from memtrain.core.evidence import LikelihoodEvidence
from memtrain.core.exclusion import ExclusionRule, FixedThreshold, KeepAll
from memtrain.data.batches import Batch
from memtrain.data.datamodule import DataModule
from memtrain.data.images import BadSample
from memtrain.data.latents import CachedSample
from memtrain.data.view import Seen, View
from memtrain.demo.stream import from_composites
from memtrain.models.pretrained import from_pretrained
from memtrain.training.methods import Method
from memtrain.training.module import DiffusionTraining
from memtrain.training.objective import Objective
from memtrain.training.optimizers import AdamW
from memtrain.training.reference import ReferenceSet
from memtrain.training.score_memory import ScoreMemory, Scoring

DEMO_PIPELINE = Path(__file__).resolve().parents[1] / "demo" / "pipeline"
BATCH_SIZES = {"demo": 32, "sd": 4}
BASELINE = "none"
SAMPLES = 10_000
STEPS = 4  # that long, so that a round of `every 4th visit` is not a matter of luck, and has a reference turn
REFERENCE_EVERY = 4  # the default, and so is half the global batch
NEVER = 10**9  # a step


@dataclass(frozen=True)
class Variant:
    """How samples are scored, and who decides; nobody is left out, so that all train alike."""

    scoring: Scoring
    exclusion: ExclusionRule


def variants() -> dict[str, Variant]:
    """What is compared, by the name that the table of results gives it."""
    return {
        BASELINE: Variant(Scoring(every=0), KeepAll()),
        "every step": Variant(Scoring(), FixedThreshold(math.inf)),
        "every 4th visit": Variant(Scoring(every_visits=4), FixedThreshold(math.inf)),
        "with reference": Variant(Scoring(), _evidence()),
        "iet_agc": Variant(Scoring(every=0), IetAgc(ratio=1e9, num_bins=20, half_life=1000, warmup=30)),
    }


def _evidence() -> LikelihoodEvidence:
    """A rule that needs the reference set, with the config's values."""
    return LikelihoodEvidence(
        0.01, 0.1, memory=0.95, clip=2.0, shift=1.0, shift_weight=10.0, num_bins=10, half_life=200,
        canary_half_life=100, own_visits=0, own_limit=1.0, copies_weight=0.5, latch=True, warmup=20,
        start_step=NEVER,
    )  # fmt: skip


class OwnTurns(ReferenceSet):
    """A reference set with the turns of one variant: it counts steps of its own, for those of the run are shared."""

    def __init__(self) -> None:
        super().__init__(REFERENCE_EVERY, batch_size=None)
        self.taken = 0

    def turn(self, step: int) -> int | None:
        """Number of the turn at this step: the first of its steps, a warm-up, has one, then one step of every round."""
        self.taken += 1
        return super().turn(self.taken - 1)


@dataclass(frozen=True)
class ScoringCost:
    """What scoring costs: medians over the rounds. `ratio`: a variant's steps over those without scoring in a round."""

    model: str
    clock: str
    parameters: int  # trained
    latents: tuple[int, int, int]
    batch_size: int
    rounds: int
    steps: int  # of each variant in a round
    step_seconds: dict[str, float]
    ratio: dict[str, float]


def measure_scoring(model: str, rounds: int, batch_size: int | None = None, steps: int = STEPS) -> ScoringCost:
    """Train one model; in every round each variant takes `steps` optimizer steps, one at a time in turn.

    A step is what Lightning does from a batch that has arrived to the weights that follow from it: forward,
    score, decision, backward, clipping, AdamW, averaged weights. On a CPU it is CPU time on one thread.

    Args:
        model: `demo`, with pictures that are encoded in the step, or `sd`, Stable Diffusion 1's UNet at a
            fifth of its width on cached latents of 32x32.
        batch_size: None: 32 and 4.

    Raises:
        ValueError: another model; fewer than one round or row.
    """
    if model not in BATCH_SIZES:
        raise ValueError(f"--models must be one of {', '.join(BATCH_SIZES)}, got {model}")
    batch_size = BATCH_SIZES[model] if batch_size is None else batch_size
    for name, value in (("--rounds", rounds), ("--batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    with tempfile.TemporaryDirectory(prefix="memtrain-bench-") as folder:
        pipeline = DEMO_PIPELINE if model == "demo" else write_sd_shaped(Path(folder) / "sd")
        module = _training(pipeline, resolution=64 if model == "demo" else 256)
        if model == "demo":
            data = from_composites(SAMPLES, 64, batch_size, 0, seed=0, **GROUPS)
        else:
            latents = NoiseLatents(module.latent_shape, _hidden_shape(module))
            data = DataModule(latents.samples, batch_size, 0, seed=0, cache=latents, **GROUPS)
        interleave = Interleave(rounds, steps)
        logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
        trainer = pl.Trainer(
            accelerator="auto",
            devices=1,
            max_steps=interleave.num_steps,
            max_epochs=-1,
            logger=False,
            callbacks=[interleave],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            gradient_clip_val=1.0,
            default_root_dir=folder,
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            trainer.fit(module, datamodule=data)
        finally:
            torch.set_num_threads(threads)
    seconds = interleave.seconds
    return ScoringCost(
        model,
        "CPU time on one thread" if module.device.type == "cpu" else f"time on {module.device}",
        sum(parameter.numel() for parameter in module.trained_parameters()),
        module.latent_shape,
        batch_size,
        rounds,
        steps,
        {name: median(taken) / steps for name, taken in seconds.items()},
        {
            name: median(ours / base for ours, base in zip(taken, seconds[BASELINE], strict=True))
            for name, taken in seconds.items()
        },
    )


class Interleave(pl.Callback):
    """Gives each step to a variant, and times it; a machine that is busy for a while is so for all of them.

    The first two steps of each warm up. The variants take turns step by step, each time another one first.
    """

    def __init__(self, rounds: int, steps: int):
        self.variants = variants()
        self.rounds, self.steps = rounds, steps
        names = list(self.variants)
        self.num_steps = (2 + rounds * steps) * len(names)
        self.seconds: dict[str, list[float]] = {name: [0.0] * rounds for name in names}
        self._turns = self._plan(names)
        self._memories: dict[str, ScoreMemory | None] = {}
        self._references = {name: OwnTurns() for name in names}

    def _plan(self, names: list[str]) -> Iterator[tuple[str, int | None]]:
        """The variant of each step, and its round; None: it warms up."""
        yield from ((name, None) for name in names * 2)
        for number in range(self.rounds * self.steps):
            first = number % len(names)
            yield from ((name, number // self.steps) for name in names[first:] + names[:first])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionTraining)
        for name, variant in self.variants.items():
            variant.exclusion.setup(SAMPLES, pl_module.num_timesteps)
            self._memories[name] = ScoreMemory(SAMPLES, variant.scoring) if variant.scoring.remembers else None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DiffusionTraining)
        self._name, self._round = next(self._turns)
        variant = self.variants[self._name]
        pl_module.scoring, pl_module.exclusion = variant.scoring, variant.exclusion
        pl_module.memory, pl_module.reference = self._memories[self._name], self._references[self._name]
        self._began = self._now(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self._round is not None:
            self.seconds[self._name][self._round] += self._now(pl_module) - self._began

    def _now(self, module: pl.LightningModule) -> float:
        """Seconds on the clock that steps are timed by: CPU time, or the time when the GPU is done."""
        if module.device.type == "cpu":
            return time.process_time()  # on one thread
        torch.cuda.synchronize(module.device)
        return time.perf_counter()


# ---- what is trained

GROUPS: dict[str, Any] = {"canaries": 0, "repeats": 1, "reference": 200}


def _training(pipeline: Path, resolution: int) -> DiffusionTraining:
    return DiffusionTraining(
        from_pretrained(str(pipeline), "auto", False, gradient_checkpointing=False, channels_last=False, compile=False),
        KeepAll(),
        AdamW(1e-5, (0.9, 0.999), 0.01, 1e-8, "constant", 0, eight_bit=False),
        Method(),
        seed=0,
        resolution=resolution,
        objective=Objective("kept", caption_dropout=0.1, min_snr_gamma=None, noise_offset=0.0),
        scoring=Scoring(),
        reference_every=NEVER,
        reference_batch=None,
        ema_decay=0.99,
    )


def _hidden_shape(module: DiffusionTraining) -> tuple[int, int]:
    _, length, width = module.model.null(1).hidden.shape
    return length, width


class NoiseSamples:
    """Samples without pictures, for latents that are there without them. See `memtrain.data.batches.Samples`."""

    sizes = [(256, 256)]  # noqa: RUF012
    counts = [SAMPLES]  # noqa: RUF012

    def key(self, index: int) -> str:
        return f"noise/{index:09d}"

    def size_of(self, index: int) -> tuple[int, int]:
        return self.sizes[0]

    def get(self, index: int, view: View, size: tuple[int, int]) -> Seen:
        raise BadSample("there is no picture, only latents")

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Nothing is to be fetched."""

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Nothing is to be read."""


class NoiseLatents:
    """Noise in the place of cached latents: neither VAE nor text encoder takes part in a step.

    See `memtrain.data.batches.Latents`.
    """

    samples = NoiseSamples()

    def __init__(self, latent_shape: tuple[int, int, int], hidden_shape: tuple[int, int]):
        self.latent_shape, self.hidden_shape = latent_shape, hidden_shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"posterior": (2, *self.latent_shape), "hidden": self.hidden_shape}

    def get(self, index: int, flip: bool) -> CachedSample:
        rng = np.random.default_rng(index)
        mean, hidden = (rng.standard_normal(shape, np.float32) for shape in (self.latent_shape, self.hidden_shape))
        posterior = np.stack([mean, np.full_like(mean, 0.1)])  # two of (C, h, w) -> (2, C, h, w)
        return CachedSample({"posterior": posterior, "hidden": hidden}, "noise")


def write_sd_shaped(folder: Path) -> Path:
    """An untrained pipeline around Stable Diffusion 1's UNet, blocks and heads as there, a fifth as wide.

    VAE and text encoder are as small as they can be; they are not measured.
    """
    torch.manual_seed(0)  # the weights' initialisation takes no generator
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 256, 256),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        attention_head_dim=8,  # what diffusers calls so is the number of heads in this class
        cross_attention_dim=160,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=256,
    )
    tokenizer = CLIPTokenizer.from_pretrained(str(DEMO_PIPELINE / "tokenizer"), model_max_length=77)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=160,
            num_hidden_layers=1,
            num_attention_heads=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_pretrained(str(DEMO_PIPELINE / "scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
