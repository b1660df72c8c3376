"""`memtrain repair`: read what is to be forgotten and what is to stay, change the model, write it and what was done."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from memtrain.audit.prompts import read_prompts
from memtrain.cli.audited import load_audited
from memtrain.cli.checks import check_repair

if TYPE_CHECKING:
    from memtrain.audit.denoiser import Denoiser
    from memtrain.audit.repair.forget_list import Entry
    from memtrain.audit.repair.material import CaptionedPictures
    from memtrain.audit.repair.repairing import Criterion, Repair, Repaired
    from memtrain.audit.repair.work import Steps
    from memtrain.data.samples import ShardSamples
    from memtrain.models.adapters import Adapter

log = logging.getLogger(__name__)

FOLDER = "repair"  # in out: what was done
MEMORY = "forgotten.safetensors"  # there: what was forgotten, for repairs to come
WRITTEN = "repair.json"
_LR = {"lora": 5e-3, "all": 5e-4}
_HARMLESS = 24  # captions that stand in for such as were never seen
_NOT_REACHED = 1  # exit code


def repair(cfg: DictConfig) -> None:
    chosen = _method(cfg)
    check_repair(cfg)
    method = instantiate(chosen, _convert_="all")
    from memtrain.audit.repair.forget_list import read_forget_list
    from memtrain.audit.repair.repairing import Criterion
    from memtrain.audit.repair.work import Steps

    entries = read_forget_list(cfg.forget.list, cfg.forget.column, cfg.forget.label)
    settings = Steps(
        cfg.steps,
        cfg.lr or _LR[cfg.weights],
        cfg.forgotten_rows,
        cfg.kept_rows,
        cfg.keep_weight,
        cfg.near_share,
        cfg.lowest_noise,
    )
    criterion = Criterion(
        cfg.score_margin, cfg.copy_margin, cfg.min_steps, cfg.look_every, cfg.max_rmse, cfg.false_copies
    )
    earlier, bases = _earlier(cfg)
    denoiser = load_audited(cfg)
    _check_base(cfg, denoiser, bases)
    _settle(denoiser)
    base = denoiser.model.fingerprint(denoiser.model.network_name)
    made = _prepare(cfg, denoiser, entries, settings, criterion, earlier, method.needs_neighbours)
    if made.reproduces_nothing and not cfg.force:
        raise ValueError(
            f"the model reproduces nothing of forget={cfg.forget.list}: {made.said_of_start}. A repair would change "
            f"{cfg.weights} weights of its {denoiser.model.network_name} in up to {settings.steps} steps all the same; "
            "say force=true for it"
        )
    with _bar(settings.steps) as advance:
        done = made.run(method, advance)
    _write(cfg, denoiser, made, done, base)
    _print(cfg, done)
    if not done.reached:
        sys.exit(_NOT_REACHED)


def _method(cfg: DictConfig) -> DictConfig:
    known = [name for name in cfg.method if name != "names"]
    if cfg.method.names not in known:
        raise ValueError(f"method must be one of {', '.join(known)}, got {cfg.method.names}")
    return cfg.method[cfg.method.names]


# ---- what is at hand


def _prepare(
    cfg: DictConfig,
    denoiser: Denoiser,
    entries: Sequence[Entry],
    settings: Steps,
    criterion: Criterion,
    earlier: CaptionedPictures | None,
    needs_neighbours: bool,
) -> Repair:
    """The repair that the config asks for, before any step; its own generations and neighbours are made here."""
    from memtrain.audit.batches import ShrinkingBatches
    from memtrain.audit.repair.material import (
        CaptionedPictures,
        Drawing,
        forgotten_pictures,
        kept_from_shards,
        kept_of_its_own,
        least_like,
        watched_of,
        without,
    )
    from memtrain.audit.repair.repairing import Repair

    sampling = Drawing(cfg.num_inference_steps, denoiser.guidance_scale, cfg.num_images_per_prompt)
    batches = ShrinkingBatches(cfg.batch_size)
    kept_samples = _samples(cfg.keep.shards, cfg, denoiser)
    samples = kept_samples if cfg.data.shards is None else _samples(cfg.data.shards, cfg, denoiser)
    adapter = _adapter(cfg)
    forgotten = forgotten_pictures(denoiser, entries, samples, sampling, cfg.seed, batches)
    if settings.steps * settings.forgotten_rows < len(forgotten):
        log.warning(
            "%d pictures are to be forgotten, and %d steps of %d rows see the first %d alone; raise steps or "
            "forgotten_rows",
            len(forgotten), settings.steps, settings.forgotten_rows, settings.steps * settings.forgotten_rows,
        )  # fmt: skip
    if earlier is not None:  # what is forgotten once more is not held where it is
        earlier = without(earlier, forgotten, cfg.max_rmse)
        earlier = earlier if len(earlier) else None
    gone = forgotten if earlier is None else CaptionedPictures.cat([earlier, forgotten])
    harmless = None if cfg.keep.captions is None else read_prompts(cfg.keep.captions).texts
    reference = None if cfg.reference is None else read_prompts(cfg.reference).texts
    near: list[list[str]] = []
    if needs_neighbours or (kept_samples is None and (reference is None or harmless is None)):
        near = _neighbours(denoiser, forgotten.captions, cfg)
    spread = [caption for row in zip(*near, strict=False) for caption in row][:_HARMLESS]
    if kept_samples is not None:
        kept = kept_from_shards(denoiser, kept_samples, cfg.keep.count, gone, cfg.max_rmse, cfg.seed, batches)
    else:
        cache = Path(cfg.keep.cache or Path(cfg.out) / FOLDER / "kept.safetensors").expanduser()
        few = min(cfg.keep.count, 4 * len(harmless or spread))
        kept = kept_of_its_own(
            denoiser, harmless or spread, few, gone, cfg.max_rmse, sampling, cfg.seed, batches, cache
        )
    watched, kept = watched_of(kept, forgotten, cfg.watched)
    # a neighbour may bring back the very picture: where there are kept ones, their captions say what chance makes
    unlike = spread if kept_samples is None else least_like(kept.captions, forgotten.captions, _HARMLESS)
    return Repair(
        denoiser,
        adapter,
        forgotten,
        kept,
        list(dict.fromkeys(reference or unlike)),
        watched,
        settings=settings,
        criterion=criterion,
        sampling=sampling,
        neighbours=[row[0] for row in near] if near else None,
        earlier=earlier,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        gradient_checkpointing=cfg.gradient_checkpointing,
    )


def _samples(shards: Any, cfg: DictConfig, denoiser: Denoiser) -> ShardSamples | None:
    """Those of shards that the config names, as it says that they were read in training; None where it names none."""
    if shards is None:
        return None
    from memtrain.data.samples import ShardSamples

    plain, side = OmegaConf.to_container(OmegaConf.create({"shards": shards}))["shards"], min(denoiser.model.own_size)
    return ShardSamples(plain, side, cfg.data.caption, cfg.data.where, cfg.data.cache_dir)


def _adapter(cfg: DictConfig) -> Adapter:
    from memtrain.models.adapters import Adapter, LowRank

    if cfg.weights == "all":
        return Adapter()
    wanted = OmegaConf.to_container(cfg, resolve=True)["target_modules"]
    return LowRank(cfg.rank, None, 0.0, wanted, False, False, False, ("diffusers",))


def _neighbours(denoiser: Denoiser, captions: Sequence[str], cfg: DictConfig) -> list[list[str]]:
    """Of each caption, those with another word for the one that matters most, the least scored first; where no other
    word is known, the caption without it."""
    from memtrain.audit.explain.explanation import explain

    found = []
    explanations = explain(
        denoiser, list(captions), num_images_per_prompt=2, num_inference_steps=cfg.num_inference_steps,
        guidance_scale=denoiser.guidance_scale, steps=(0, 1), seed=cfg.seed, batch_size=cfg.batch_size, suggest=2,
    )  # fmt: skip
    for caption, explanation in zip(captions, explanations, strict=True):
        edits = [edit for edit in explanation.edits if edit.prompt.strip() and edit.prompt not in captions]
        texts = [edit.prompt for edit in edits if edit.replacement is not None]
        texts += [edit.prompt for edit in edits if edit.replacement is None]
        if not texts:
            raise ValueError(f"forget: no neighbour of {caption!r} is known; say reference=FILE and keep=SHARDS")
        found.append(texts)
    return found


def _earlier(cfg: DictConfig) -> tuple[CaptionedPictures | None, dict[str, dict]]:
    """CaptionedPictures that earlier repairs took out of the model, and what those repairs say, by folder."""
    from memtrain.audit.repair.material import CaptionedPictures

    named = OmegaConf.to_container(cfg, resolve=True)["earlier"] or []
    named = [named] if isinstance(named, str) else named
    implied = [path for path in (cfg.model.pretrained, cfg.lora) if path is not None]
    parts, said = [], {}
    for place, folder in enumerate([*named, *implied]):
        path = Path(folder).expanduser()
        own = next((one for one in (path, path.parent) if (one / FOLDER / MEMORY).is_file()), None)
        if own is None or str(own) in said:
            if place < len(named) and own is None:
                raise ValueError(f"earlier={folder} is no repair: it has no {FOLDER}/{MEMORY}; name a repair's out")
            continue
        loaded = CaptionedPictures.load(own / FOLDER / MEMORY)
        if loaded is None:
            raise ValueError(f"{own / FOLDER / MEMORY} cannot be read; make that repair again, or delete the file")
        parts.append(loaded[0])
        said[str(own)] = json.loads((own / FOLDER / WRITTEN).read_text(encoding="utf-8"))
    return (CaptionedPictures.cat(parts) if parts else None), said


def _check_base(cfg: DictConfig, denoiser: Denoiser, said: dict[str, dict]) -> None:
    """Raises ValueError where the LoRA of a repair is loaded into another model than the one that it repaired."""
    if cfg.lora is None:
        return
    lora = Path(cfg.lora).expanduser()
    own = next((one for folder, one in said.items() if Path(folder) in (lora, lora.parent)), None)
    name = denoiser.model.network_name
    if own is not None and _hash_of_base(denoiser) != own["base"][name]:
        raise ValueError(
            f"lora={cfg.lora} repairs another model, {own['model']}, than model={cfg.model.pretrained}: its {name} had "
            "other weights; name that one"
        )


def _hash_of_base(denoiser: Denoiser) -> str:
    """Of the network that predicts, without a LoRA that was loaded into it."""
    from memtrain.models.adapters import without_adapter
    from memtrain.models.pipelines import hash_weights

    return hash_weights(without_adapter(denoiser.model.network))


def _settle(denoiser: Denoiser) -> None:
    """Make a LoRA that was loaded part of the weights: a repair begins with the model as it is."""
    from memtrain.models.adapters import has_adapter, merged

    model = denoiser.model
    for name in model.network_names:
        network = getattr(model, name)
        if network is not None and has_adapter(network):
            setattr(model, name, merged(network).to(model.device))


# ---- what comes of it


def _write(cfg: DictConfig, denoiser: Denoiser, made: Repair, done: Repaired, base: dict[str, str]) -> None:
    import torch

    from memtrain.audit.pictures import decode_latents
    from memtrain.audit.repair.material import CaptionedPictures
    from memtrain.report.repair import write_report

    out = Path(cfg.out).expanduser()
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    made.adapter.export_whole(denoiser.model, out, torch.float32)
    if cfg.weights == "lora":
        made.adapter.export(denoiser.model, out / "lora", torch.float32)
    known = [made.forgotten] if made.earlier is None else [made.earlier, made.forgotten]
    CaptionedPictures.cat(known).save(folder / MEMORY)

    def decoded(latents: torch.Tensor):
        pictures = decode_latents(denoiser, latents.flatten(0, 1), made.batches)
        return pictures.reshape(*latents.shape[:2], *pictures.shape[1:])

    shown = {"forgotten": (decoded(done.forgotten.before), decoded(done.forgotten.after))}
    if done.kept.captions:
        shown["kept"] = (decoded(done.kept.before), decoded(done.kept.after))
    originals = decode_latents(denoiser, made.forgotten.latents, made.batches)
    heading = f"{cfg.model.pretrained}, repaired by {cfg.method.names}"
    write_report(folder, done, originals, made.forgotten.latents.numpy(), shown, heading, _facts(cfg, done))
    written = {
        "model": cfg.model.pretrained,
        "lora": cfg.lora,
        "base": base,
        "method": cfg.method.names,
        "config": OmegaConf.to_container(cfg, resolve=True),
        "reached": done.reached,
        "said": done.said,
        "steps": done.steps,
        "passes": dict(done.passes),
        "forgotten": [
            {"caption": caption, "name": name}
            for caption, name in zip(made.forgotten.captions, made.forgotten.names, strict=True)
        ],
        "looks": [asdict(look) for look in done.looks],
        "never_seen": asdict(done.never_seen),
        "kept_drift": dict(zip(done.kept.captions, done.kept.drift.tolist(), strict=True)),
        "alignment": {"before": done.alignment_before, "after": done.alignment_after},
        "earlier": done.earlier,
    }
    (folder / WRITTEN).write_text(json.dumps(written, indent=2), encoding="utf-8")


def _facts(cfg: DictConfig, done: Repaired) -> list[str]:
    """What a repair cost and changed, a line each."""
    first = done.looks[0]
    facts = [
        f"before: copies {first.copy_rate:.1%}, score {first.score:.3f}",
        f"a copy: RMSE of latents ≤ {done.never_seen.cut:.3g}, {done.never_seen.cut_is}",
        f"cost: {done.passes['steps']} forward passes of one picture in {done.steps} steps (a backward counts two), "
        f"{done.passes['looks']} more to look",
    ]
    if done.kept.captions:
        facts.append(f"kept captions' pictures moved by an RMSE of {done.kept.drift.mean():.3f} of their latents")
    if done.alignment_before is not None and done.alignment_after is not None:
        facts.append(f"their caption margin: {done.alignment_before:+.1%} before, {done.alignment_after:+.1%} after")
    if done.earlier:
        facts.append(
            f"pictures forgotten before: copies {done.earlier['before']:.1%} before this repair, "
            f"{done.earlier['after']:.1%} after it"
        )
    return facts


def _print(cfg: DictConfig, done: Repaired) -> None:
    print(done.said)
    for fact in _facts(cfg, done):
        print(f"  {fact}")
    lora = ", lora" if cfg.weights == "lora" else ""
    print(f"\n{cfg.out}: a pipeline{lora}, {FOLDER}/report.html, before_after.png, curves.png, {WRITTEN}")


@contextmanager
def _bar(steps: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("repairing", total=steps)
        yield lambda done, total: progress.update(task, completed=done)
