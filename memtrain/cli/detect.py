"""`memtrain detect`: load model and prompts, score, write table, summary and plots."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, ListConfig, OmegaConf

from memtrain.audit.prompts import read_prompts, together
from memtrain.cli.audited import load_audited, load_base
from memtrain.cli.checks import check_detection
from memtrain.cli.distributors import distributor_in
from memtrain.data.distribute import Local, Part

if TYPE_CHECKING:  # torch is imported when what can be refused without it has been
    from memtrain.audit.denoiser import Denoiser
    from memtrain.audit.detect.anchored import Anchored
    from memtrain.audit.detect.scores import Density, StepScore

log = logging.getLogger(__name__)


def detect(cfg: DictConfig) -> None:
    check_detection(cfg)
    prompts = _prompts(cfg)
    from memtrain.audit.detect import detection as audit
    from memtrain.audit.detect.spread import Spread
    from memtrain.report.detection import show_summary, write_detection

    max_fprs = list(cfg.max_fpr) if isinstance(cfg.max_fpr, ListConfig) else [cfg.max_fpr]
    audit.check_max_fprs(max_fprs)
    plain = OmegaConf.to_container(cfg, resolve=True)
    distributor = distributor_in(cfg, otherwise=1)
    load = None if distributor == Local() else partial(_loaded, plain)  # this process has loaded the model anyway
    spread = Spread(distributor, load, Part.parse(cfg.part), cfg.merge)
    denoiser, scores = _loaded(plain)
    out = Path(cfg.out).expanduser()
    detection = audit.detect(
        denoiser,
        prompts.texts,
        prompts.labels,
        prompts.groups,
        scores=scores,
        num_images_per_prompt=cfg.num_images_per_prompt,
        num_scored_steps=cfg.num_scored_steps,
        num_inference_steps=cfg.num_inference_steps,
        guidance_scale=cfg.guidance_scale,
        seed=cfg.seed,
        shared_noise=cfg.shared_noise,
        batch_size=cfg.batch_size,
        out=out,
        overwrite=cfg.overwrite,
        progress=True,
        spread=spread,
    )
    if spread.part.count > 1:
        print(f"{out}: part {spread.part}, {len(detection.prompts)} prompts; `merge` writes the table of all parts")
        return
    about = {
        "model": str(cfg.model.pretrained),
        "lora": cfg.lora,
        "base": cfg.base,
        "source": prompts.source,
        "device": str(denoiser.device),
        "dtype": cfg.dtype,
    }
    known = detection.finite()
    lost = len(detection.prompts) - len(known.prompts)
    if not known.prompts:
        raise ValueError(f"no prompt has finite scores in dtype={cfg.dtype}; say dtype=float32 or bfloat16")
    if lost:
        log.warning(
            "%d of %d prompts have scores that are not finite, as dtype=%s overflows there: they are in scores.parquet "
            "and in no figure; dtype=bfloat16 has the range",
            lost, len(detection.prompts), cfg.dtype,
        )  # fmt: skip
    summary = about | known.summary(max_fprs, cfg.threshold, cfg.top) | {"not_finite": lost}
    write_detection(out, detection, summary)
    print(show_summary(summary))
    print(
        f"\n{out}: scores.parquet, summary.json, steps.png, distributions.png" + (", roc.png" if prompts.labels else "")
    )


def _loaded(plain: dict) -> tuple[Denoiser, list[StepScore | Density]]:
    """The model and the scores that a config names; of each worker its own."""
    from memtrain.audit.detect.detection import named_scores

    cfg = OmegaConf.create(plain)
    denoiser = load_audited(cfg)
    return denoiser, named_scores(list(cfg.scores), cfg.embedding, denoiser.device, _anchored(cfg, denoiser))


def _anchored(cfg: DictConfig, denoiser: Denoiser) -> Callable[[], Anchored] | None:
    """Makes the anchored score where there is something to compare with: `base`, else the model without `lora`."""
    from memtrain.audit.detect.anchored import Anchored

    if cfg.base is not None:
        return lambda: Anchored.against(load_base(cfg))
    return None if cfg.lora is None else lambda: Anchored.without_adapter(denoiser)


def _prompts(cfg: DictConfig):
    """One file, or two that are the labels."""
    two = cfg.memorized, cfg.other
    if cfg.prompts is not None and two == (None, None):
        return read_prompts(cfg.prompts, cfg.column, cfg.label, cfg.group)
    if cfg.prompts is None and None not in two:
        if cfg.label is not None:
            raise ValueError("prompts.label and memorized=… other=… both give labels; leave one out")
        return together(*(read_prompts(path, cfg.column, None, cfg.group) for path in two))
    raise ValueError("say prompts=FILE, or memorized=FILE other=FILE")
