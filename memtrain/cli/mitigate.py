"""`memtrain mitigate`: load model and prompts, generate with and without, write what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from memtrain.audit.prompts import read_prompts
from memtrain.cli.audited import load_audited, load_judge
from memtrain.cli.checks import check_mitigation
from memtrain.cli.explain import labelled, progress_bar, prompt_texts


def mitigate(cfg: DictConfig) -> None:
    names = _methods(cfg)
    for key, least in (("cut_prompts", 0), ("nearest", 1)):
        if cfg[key] is not None and cfg[key] < least:
            raise ValueError(f"{key} must be >= {least}, got {cfg[key]}")
    check_mitigation(cfg)
    texts, keys, reference = _prompts(cfg)
    import torch

    from memtrain.audit.mitigate.comparison import Comparison, Judges, markdown
    from memtrain.audit.mitigate.mitigation import Sampling

    methods = {name: instantiate(cfg.method[name]) for name in names}
    sampling = Sampling(cfg.num_inference_steps, cfg.guidance_scale)
    denoiser = load_audited(cfg)
    sampling = replace(sampling, guidance_scale=denoiser.guidance_scale)
    samples = None if keys is None else _samples(cfg, denoiser)
    judges = Judges(
        originals=None if samples is None else _originals(samples, denoiser, keys),
        max_rmse=cfg.max_rmse,
        false_copies=cfg.false_copies,
        judge=load_judge(cfg),
        clip=_clip(cfg, torch.device(denoiser.device)),
    )
    comparison = Comparison(
        denoiser, texts, cfg.num_images_per_prompt, sampling, judges, seed=cfg.seed, batch_size=cfg.batch_size
    )
    if samples is not None and reference and cfg.cut_prompts:
        _set_cut(cfg, comparison, samples, keys, reference[: cfg.cut_prompts])
    target = comparison.target(cfg.target, reference) if any(m.needs_target for m in methods.values()) else None
    out = Path(cfg.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    before = comparison.run("none", None, None, progress_bar)
    results = [before]
    for name, method in methods.items():
        after = comparison.run(name, method, target, progress_bar)
        _write(out, comparison, before, after, cfg.shown)
        results.append(after)
    table = markdown([result.outcome for result in results])
    written = {
        "model": cfg.model.pretrained,
        "lora": cfg.lora,
        "prompts": texts,
        "seeds": comparison.seeds,
        "target": target,
        "cut": comparison.cut.distance,
        "cut_is": comparison.cut.why,
        "num_images_per_prompt": cfg.num_images_per_prompt,
        **asdict(sampling),
        "methods": [
            {
                **asdict(result.outcome),
                "scores": result.generations.scores[:, 0].tolist(),
                "prompts_given": result.generations.prompts,
                "iterations_of_each": result.generations.iterations.tolist(),
                "guided_from": result.generations.guided_from.tolist(),
                "rmse_of_each": None if result.rmse is None else result.rmse.tolist(),
            }
            for result in results
        ],
    }
    (out / "mitigate.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    (out / "table.md").write_text(f"{table}\n", encoding="utf-8")
    target_said = "" if target is None else f", target {target:.3f}"
    print(f"{len(texts)} prompts, {cfg.num_images_per_prompt} generations each{target_said}\n\n{table}")
    if samples is not None:
        print(f"\nA copy: RMSE of latents ≤ {comparison.cut.distance:.3g}, {comparison.cut.why}.")
    print(f"\n{out}: mitigate.json, table.md, METHOD.png, METHOD.safetensors")


def _methods(cfg: DictConfig) -> list[str]:
    known = [name for name in cfg.method if name != "names"]
    names = list(cfg.method.names) if isinstance(cfg.method.names, ListConfig) else [cfg.method.names]
    names = {"all": known, "none": []}.get(names[0], names) if len(names) == 1 else names
    for name in names:
        if name not in known:
            raise ValueError(f"method must be one of {', '.join(known)}, all or none, got {name}")
    return names


def _prompts(cfg: DictConfig) -> tuple[list[str], list[str] | None, list[str] | None]:
    """Prompts to mitigate, the names of their training images, and the reference prompts."""
    texts, keys, reference = prompt_texts(cfg), None, None
    if cfg.data.shards is not None:
        if cfg.prompts is None:
            raise ValueError("data= needs prompts=FILE with a column key that names each prompt's training image")
        named = read_prompts(cfg.prompts, cfg.column, cfg.label, "key")
        memorized = named.labels or [True] * len(named)
        keys = [key for key, wanted in zip(named.groups, memorized, strict=True) if wanted]
    if cfg.reference is not None:
        reference = read_prompts(cfg.reference, cfg.column).texts
    elif cfg.label is not None:
        labels = read_prompts(cfg.prompts, cfg.column, cfg.label)
        reference = labelled(labels, memorized=False) if False in labels.labels else None
    return texts, keys, reference


def _samples(cfg: DictConfig, denoiser):
    from omegaconf import OmegaConf

    from memtrain.data.samples import ShardSamples

    return ShardSamples(OmegaConf.to_container(cfg.data, resolve=True)["shards"], min(denoiser.model.own_size))


def _originals(samples, denoiser, keys: Sequence[str]):
    from memtrain.audit.training_samples import read_pictures

    return read_pictures(samples, samples.find(keys).tolist(), denoiser.model.own_size)


def _set_cut(cfg: DictConfig, comparison, samples, keys: Sequence[str], reference: Sequence[str]) -> None:
    """Generate from the reference prompts, and hold that against all training pictures."""
    from memtrain.audit.pictures import encode_images
    from memtrain.audit.training_pictures import TrainingPictures

    held_out = []
    if cfg.reference is None:  # else whose pictures these prompts' are is not known
        named = read_prompts(cfg.prompts, cfg.column, cfg.label, "key")
        held_out = [key for key, wanted in zip(named.groups, named.labels, strict=True) if not wanted]
    pictures = TrainingPictures(
        samples, samples.find(held_out).tolist(), cfg.nearest, samples.find(keys).tolist(), cfg.seed
    )
    denoiser, batches = comparison.denoiser, comparison.batches
    size = denoiser.model.own_size
    comparison.set_cut(reference, pictures.blocks(size, lambda pixels: encode_images(denoiser, pixels, batches), []))


def _clip(cfg: DictConfig, device):
    from memtrain.audit.alignment import ClipScore

    return ClipScore(cfg.clip, device) if cfg.clip else None


def _write(out: Path, comparison, before, after, shown: int) -> None:
    from safetensors.torch import save_file

    from memtrain.report.before_after import draw_before_after

    name, made = after.outcome.method, after.generations
    tensors = {"prompt_embeds": made.prompt_embeds, "latents": made.start}
    if made.pooled_prompt_embeds is not None:
        tensors["pooled_prompt_embeds"] = made.pooled_prompt_embeds
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / f"{name}.safetensors")
    draw_before_after(out / f"{name}.png", comparison.pairs(before, after, shown), name)
