"""`detect`: which prompts has a finished model memorized?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from diffusers import DiffusionPipeline

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser
from memtrain.audit.detect.anchored import Anchored
from memtrain.audit.detect.attention import cross_attention_layers
from memtrain.audit.detect.density import EmbeddingDensity, TiledL2Density
from memtrain.audit.detect.parts import Parts
from memtrain.audit.detect.scores import STEP_SCORES, Density, StepScore
from memtrain.audit.detect.scoring import (
    DetectionSettings,
    Plan,
    Scorer,
    flat,
    in_chunks,
    load_scorer,
    nested,
    no_scores,
    plan_of,
)
from memtrain.audit.detect.separation import by_group, by_step, check_labels, separation
from memtrain.audit.detect.spread import Spread, score

SCORE_NAMES = (*(score.name for score in STEP_SCORES), TiledL2Density.name, EmbeddingDensity.name, Anchored.name)


@dataclass(frozen=True)
class Detection:
    """Scores of P prompts, from n generations and k scored steps each; higher means memorized."""

    prompts: list[str]
    labels: list[bool] | None  # True = memorized
    groups: list[str] | None
    truncated: np.ndarray  # (P,) bool, the prompt is longer than the text encoder reads
    steps: dict[str, np.ndarray]  # name: (P, n, k) float32
    densities: dict[str, np.ndarray]  # name: (P,) float32, of finished pictures
    timesteps: list[float]  # k, of the scored steps; whole numbers but for a rectified flow
    main: str  # the score that `scores` and flags are about
    evaluations: int  # of the network, a prompt
    evaluations_alone: dict[str, int]  # what each score would take alone
    seconds: float  # spent on the prompts that this call scored
    newly_scored: int  # of the P prompts; the others were found where a stopped run had left them

    @property
    def names(self) -> list[str]:
        return [*self.steps, *self.densities]

    def of(self, name: str) -> np.ndarray:
        """A score of each prompt, averaged over generations and steps. (P,)"""
        return self.densities[name] if name in self.densities else self.steps[name].mean(axis=(1, 2))

    @property
    def scores(self) -> np.ndarray:
        """The main score of each prompt. (P,)"""
        return self.of(self.main)

    def finite(self) -> Detection:
        """Of the prompts all of whose scores are finite numbers: a half precision may overflow in some."""
        known = np.ones(len(self.prompts), bool)
        for values in (*self.steps.values(), *self.densities.values()):
            known &= np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if known.all():
            return self
        places = np.flatnonzero(known).tolist()

        def those(of: list | None) -> list | None:
            return None if of is None else [of[place] for place in places]

        labels = those(self.labels)
        return replace(
            self,
            prompts=those(self.prompts),
            labels=labels if labels and len(set(labels)) == 2 else None,
            groups=those(self.groups),
            truncated=self.truncated[known],
            steps={name: values[known] for name, values in self.steps.items()},
            densities={name: values[known] for name, values in self.densities.items()},
        )

    def separation(self, max_fprs: Sequence[float] = (0.01,)) -> dict[str, dict]:
        """For each score what `audit.detect.separation` says, by step and by group too. Needs labels."""
        labels = np.array(self.labels)
        figures = {}
        for name in self.names:
            figures[name] = separation(self.of(name), labels, max_fprs)
            if name in self.steps:
                figures[name]["by_step"] = by_step(self.steps[name], labels)
            if self.groups is not None:
                figures[name]["groups"] = by_group(self.of(name), labels, self.groups, max_fprs)
        return figures

    def table(self, threshold: float | None = None) -> pa.Table:
        """A row a prompt, in the list's order; `flagged` where the main score reaches the threshold."""
        count = len(self.prompts)
        columns = {
            "position": pa.array(range(count), pa.int64()),
            "prompt": pa.array(self.prompts, pa.string()),
            "label": pa.array(self.labels or [None] * count, pa.bool_()),
            "group": pa.array(self.groups or [None] * count, pa.string()),
            "truncated": pa.array(self.truncated.tolist(), pa.bool_()),
            "flagged": pa.array(
                [None] * count if threshold is None else (self.scores >= threshold).tolist(), pa.bool_()
            ),
        }
        columns |= {name: pa.array(self.of(name), pa.float32()) for name in self.names}
        return pa.table(columns | {f"{name}_steps": nested(values) for name, values in self.steps.items()})

    def summary(self, max_fprs: Sequence[float] = (0.01,), threshold: float | None = None, top: int = 20) -> dict:
        """What there is to say about the list: JSON values, `nan` aside.

        Args:
            max_fprs: false-positive rates for which labels give a threshold; flags use the first.
            threshold: flags use this one instead.
            top: so many prompts of the highest main score are named.
        """
        check_max_fprs(max_fprs)
        figures = {} if self.labels is None else self.separation(max_fprs)
        if threshold is None and figures:
            threshold = figures[self.main]["at_fpr"][0]["threshold"]
        order = np.argsort(-self.scores, kind="stable")
        return {
            "prompts": len(self.prompts),
            "truncated": int(self.truncated.sum()),
            "timesteps": self.timesteps,
            "main_score": self.main,
            "threshold": threshold,
            "flagged": None if threshold is None else int((self.scores >= threshold).sum()),
            "evaluations_per_prompt": self.evaluations,
            "newly_scored": self.newly_scored,
            "seconds": self.seconds,
            "prompts_per_second": self.newly_scored / self.seconds if self.newly_scored else None,
            "scores": {
                name: {
                    "evaluations_per_prompt_alone": self.evaluations_alone[name],
                    "mean": float(self.of(name).mean()),
                    "quantiles": dict(
                        zip(
                            ("min", "median", "max"),
                            np.quantile(self.of(name), (0, 0.5, 1)).tolist(),
                            strict=True,
                        )
                    ),
                    **figures.get(name, {}),
                }
                for name in self.names
            },
            "top": [
                {"position": int(place), "prompt": self.prompts[place], "score": float(self.scores[place])}
                for place in order[:top]
            ],
        }


def detect(
    pipeline: DiffusionPipeline | Denoiser,
    prompts: str | Sequence[str],
    labels: Sequence[bool] | None = None,
    groups: Sequence[str] | None = None,
    *,
    scores: Sequence[str | StepScore | Density] = ("magnitude",),
    num_images_per_prompt: int = 4,
    num_scored_steps: int = 1,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    seed: int = 0,
    shared_noise: int | None = None,
    batch_size: int = 16,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    spread: Spread | None = None,
) -> Detection:
    """Score prompts by what a model predicts for them (docs/method.md, detection).

    A prompt's scores depend on the model, the settings and the prompt alone: not on the batch size,
    the order of the list or the other prompts in it. The empty prompt scores 0.

    Args:
        pipeline: a stock Stable Diffusion 1.x, 2.x, XL, 3, 3.5 or Flux.1 pipeline; nothing in it is changed.
        prompts: P of them.
        labels: True for memorized, to measure the separation.
        groups: a name for each prompt, reported apart.
        scores: names (SCORE_NAMES, but for `embedding` and `anchored`) or score objects. The first is the main one.
        num_images_per_prompt, num_scored_steps, num_inference_steps, guidance_scale, seed, shared_noise: see
            `audit.detect.scoring.DetectionSettings`; guidance_scale None is 7.5, of Flux.1 3.5.
        batch_size: generations at a time; halved where memory runs out.
        out: folder that keeps the scores while they are made, and the table; a stopped call goes on there.
        overwrite: replace what another model or other settings left in `out`, instead of refusing.
        progress: draw a bar.
        spread: who scores, and which of the prompts, a batch of them a task; None: this process, and all. Of a part
            the detection is of its own prompts, and `out` gets the table once all are there.

    Raises:
        ValueError: in one line, what is wrong with the pipeline, the prompts, the labels or the settings.
        OSError: some prompts could not be scored, however often that was tried; the others are kept in `out`.
    """
    denoiser = pipeline if isinstance(pipeline, Denoiser) else Denoiser.of(pipeline)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("prompts is an empty list; give at least one")
    for name, values in (("labels", labels), ("groups", groups)):
        if values is not None and len(values) != len(prompts):
            raise ValueError(f"{name} must have one entry a prompt: got {len(values)} for {len(prompts)} prompts")
    if labels is not None:
        check_labels(labels)
    chosen = [named_scores([one])[0] if isinstance(one, str) else one for one in scores]
    denoiser = denoiser.guided(guidance_scale)
    schedule = num_scored_steps, num_inference_steps, denoiser.guidance_scale
    plan = plan_of(DetectionSettings(num_images_per_prompt, *schedule, seed, shared_noise), chosen)
    if any(one.reads_attention or one.to_the_end for one in plan.step_scores):
        cross_attention_layers(denoiser.model.network)
    parts = None if out is None else Parts(Path(out), _made_with(denoiser, plan, prompts), overwrite)
    spread, scorer = spread or Spread(), Scorer(denoiser, plan, ShrinkingBatches(batch_size))
    prepare = partial(load_scorer, spread.load, plan.settings, batch_size) if spread.load else lambda: scorer
    chunks = list(in_chunks(len(prompts), batch_size))  # n whole batches each
    scored = score(prepare, prompts, chunks, no_scores(plan), parts, spread, progress)
    table, own = scored.table, scored.table["position"].to_pylist()
    shape = (len(own), num_images_per_prompt, num_scored_steps)
    detection = Detection(
        prompts=[prompts[place] for place in own],
        labels=None if labels is None else [bool(labels[place]) for place in own],
        groups=None if groups is None else [groups[place] for place in own],
        truncated=_truncated(denoiser, [prompts[place] for place in own]),
        steps={one.name: flat(table[f"{one.name}_steps"]).reshape(shape) for one in plan.step_scores},
        densities={density.name: table[density.name].to_numpy() for density in plan.densities},
        timesteps=denoiser.model.sampler.timesteps(num_inference_steps)[:num_scored_steps],
        main=chosen[0].name,
        evaluations=plan.evaluations(),
        evaluations_alone=plan.evaluations_alone(),
        seconds=scored.seconds,
        newly_scored=scored.newly_scored,
    )
    if parts is not None and len(own) == len(prompts):
        parts.finish(detection.table())
    return detection


def check_max_fprs(max_fprs: Sequence[float]) -> None:
    if len(max_fprs) == 0:
        raise ValueError("max_fpr is an empty list; say max_fpr=0.01")
    for max_fpr in max_fprs:
        if not 0 <= max_fpr < 1:
            raise ValueError(f"max_fpr must be in [0, 1), got {max_fpr:g}")


def named_scores(
    names: Sequence[str],
    embedding: str | None = None,
    device: torch.device | None = None,
    anchored: Callable[[], Anchored] | None = None,
) -> list[StepScore | Density]:
    """Scores by their names (SCORE_NAMES); `embedding` is the TorchScript file for the one of that name, and
    `anchored` makes the one of that name."""
    kinds = {kind.name: kind for kind in (*STEP_SCORES, TiledL2Density)}
    found: list[StepScore | Density] = []
    for name in names:
        if name in kinds:
            found.append(kinds[name]())
        elif name == EmbeddingDensity.name and embedding is not None:
            found.append(EmbeddingDensity.load(embedding, device))
        elif name == EmbeddingDensity.name:
            raise ValueError("score embedding needs a network; say embedding=PATH, in Python EmbeddingDensity(network)")
        elif name == Anchored.name and anchored is not None:
            found.append(anchored())
        elif name == Anchored.name:
            raise ValueError(
                "score anchored compares with what the model was trained from; say base=FOLDER or lora=PATH, in Python "
                "Anchored.against(pipeline)"
            )
        else:
            raise ValueError(f"there is no score {name}; use {', '.join(SCORE_NAMES)}")
    return found


def _truncated(denoiser: Denoiser, prompts: list[str]) -> np.ndarray:
    if not prompts:  # of a part that has none
        return np.zeros(0, dtype=np.bool_)
    tokenizer = denoiser.model.caption_tokenizer
    lengths = [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids]
    return np.array(lengths) > tokenizer.model_max_length


def _made_with(denoiser: Denoiser, plan: Plan, prompts: list[str]) -> dict:
    listed = hashlib.sha256()
    for prompt in prompts:
        listed.update(f"{len(prompt)} {prompt}".encode("utf-8", "surrogatepass"))
    return {
        "model": denoiser.fingerprint(),
        "prompts": listed.hexdigest(),
        "settings": asdict(plan.settings),
        "scores": [repr(score) for score in (*plan.step_scores, *plan.densities)],
    }
