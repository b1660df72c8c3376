"""`memtrain bench detect`: prompts a second against plain loops over the stock pipeline, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from memtrain.audit.denoiser import Denoiser
from memtrain.audit.detect.detection import detect
from memtrain.audit.detect.scoring import DetectionSettings
from memtrain.core.scores import text_conditional_magnitude


@dataclass(frozen=True)
class DetectionSpeed:
    """Prompts a second, medians of the rounds; the three scores of a prompt were the same."""

    prompts: int
    rounds: int
    num_images_per_prompt: int
    num_scored_steps: int
    num_inference_steps: int
    shared_noise: int
    memtrain: float
    memtrain_shared: float  # with `shared_noise`, whose scores are of other x_T
    stopped_loop: float  # the stock pipeline, a prompt at a time, stopped after the last scored step, not decoding
    whole_loop: float  # the same, all steps, decoding
    largest_difference: float  # between memtrain's scores and the loops'

    @property
    def ratios(self) -> dict[str, float]:
        """Prompts a second over those of the loops."""
        return {
            "against_whole_loop": self.memtrain / self.whole_loop,
            "against_stopped_loop": self.memtrain / self.stopped_loop,
            "shared_against_whole_loop": self.memtrain_shared / self.whole_loop,
            "shared_against_stopped_loop": self.memtrain_shared / self.stopped_loop,
        }

    def __str__(self) -> str:
        ratios = self.ratios
        return (
            f"a loop of all {self.num_inference_steps} steps with decoding, that loop stopped where nothing more is "
            f"scored: {self.memtrain:.1f} prompts a second are {ratios['against_whole_loop']:.0f} and "
            f"{ratios['against_stopped_loop']:.2f} times theirs, with shared_noise={self.shared_noise} "
            f"{self.memtrain_shared:.1f}, {ratios['shared_against_whole_loop']:.0f} and "
            f"{ratios['shared_against_stopped_loop']:.2f} times"
        )


def measure_detection(
    denoiser: Denoiser,
    prompts: list[str],
    rounds: int = 3,
    num_images_per_prompt: int = 4,
    num_scored_steps: int = 1,
    num_inference_steps: int = 50,
    batch_size: int = 16,
    shared_noise: int = 64,
) -> DetectionSpeed:
    """Score `prompts` in four ways, in turn, `rounds` times; the whole loop gets the first two only."""
    stock = denoiser.model.pipeline()
    sampling = dict(
        num_images_per_prompt=num_images_per_prompt,
        num_scored_steps=num_scored_steps,
        num_inference_steps=num_inference_steps,
    )

    def ours(shared: int | None) -> list[float]:
        return detect(denoiser, prompts, batch_size=batch_size, shared_noise=shared, **sampling).scores.tolist()

    def loop(texts: list[str], stop: bool) -> list[float]:
        return [_plain_score(stock, text, stop=stop, **sampling) for text in texts]

    few = prompts[:2]
    ways = (
        (lambda: ours(None), len(prompts)),
        (lambda: ours(shared_noise), len(prompts)),
        (lambda: loop(prompts, True), len(prompts)),
        (lambda: loop(few, False), len(few)),
    )
    loop(few[:1], True)  # warm up
    rates: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        found = []
        for rate, (way, count) in zip(rates, ways, strict=True):
            scores, seconds = _timed(way, denoiser.device)
            rate.append(count / seconds)
            found.append(scores)
    expected, _, stopped, whole = found
    differences = [abs(a - b) for a, b in zip(expected, stopped, strict=True)]
    differences += [abs(a - b) for a, b in zip(expected, whole, strict=False)]
    memtrain, shared, stopped_loop, whole_loop = (statistics.median(rate) for rate in rates)
    return DetectionSpeed(
        len(prompts),
        rounds,
        num_images_per_prompt,
        num_scored_steps,
        num_inference_steps,
        shared_noise,
        memtrain,
        shared,
        stopped_loop,
        whole_loop,
        max(differences),
    )


def _timed(way: Callable[[], list[float]], device: torch.device) -> tuple[list[float], float]:
    started = time.perf_counter()
    scores = way()  # floats: the device has finished
    return scores, time.perf_counter() - started


def _plain_score(
    pipeline: DiffusionPipeline,
    prompt: str,
    num_images_per_prompt: int,
    num_scored_steps: int,
    num_inference_steps: int,
    stop: bool,
) -> float:
    """What a short script does: generate, look at the UNet's two outputs, average d (epsilon only)."""
    seen: list[float] = []

    def look(unet, inputs, output) -> None:
        if len(seen) < num_scored_steps:
            noise_null, noise_cond = output[0].chunk(2)
            seen.append(text_conditional_magnitude(noise_cond, noise_null).mean().item())

    def stop_when_seen(pipeline, step, timestep, values) -> dict:
        pipeline._interrupt = step + 1 >= num_scored_steps
        return values

    rows = [
        torch.randn(
            pipeline.unet.config.in_channels,
            *[pipeline.unet.config.sample_size] * 2,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in DetectionSettings(num_images_per_prompt).seeds(prompt)
    ]
    hook = pipeline.unet.register_forward_hook(look)
    try:
        pipeline(
            prompt,
            num_images_per_prompt=num_images_per_prompt,
            latents=torch.stack(rows).to(pipeline._execution_device, pipeline.unet.dtype),
            num_inference_steps=num_inference_steps,
            callback_on_step_end=stop_when_seen if stop else None,
            output_type="latent" if stop else "np",
        )
    finally:
        hook.remove()
    return statistics.mean(seen)
