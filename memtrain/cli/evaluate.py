"""`memtrain evaluate`: choose samples and measures, evaluate each model, print a table, write the results."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from memtrain.cli.audited import as_trained, load_judge
from memtrain.cli.checks import check_evaluation
from memtrain.cli.distributors import distributor_in
from memtrain.data.distribute import Local, Part

if TYPE_CHECKING:
    from memtrain.audit.denoiser import Denoiser
    from memtrain.audit.evaluate.results import ModelResult
    from memtrain.audit.evaluate.settings import Measures
    from memtrain.data.samples import ShardSamples

log = logging.getLogger(__name__)

_HEADS = {  # of the table: eighty columns hold it
    "samples": "n",
    "of any": "of\nany",
    "samples copied": "n with\ncopies",
    "RMSE of latents": "RMSE",
    "nearest": "near-\nest",
    "under attack": "under\nattack",
    "beyond reach": "beyond\nreach",
    "CLIP score": "CLIP\nscore",
}
_CHECKED_SIDE = 64  # px, at which pictures are read to see whether they can be


def evaluate(cfg: DictConfig) -> None:
    models = _models(cfg)
    loras = _loras(cfg, models)
    if OmegaConf.is_missing(cfg.data, "shards"):
        raise ValueError("data is missing; name the shards that the model was trained on: data=FOLDER")
    distributor, part = distributor_in(cfg, otherwise=1), Part.parse(cfg.part)
    check_evaluation(cfg, models, loras)
    from hydra.utils import instantiate
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from memtrain.audit.evaluate import several_models as room
    from memtrain.audit.evaluate.settings import Settings
    from memtrain.audit.training_samples import choose
    from memtrain.report.gallery import write_gallery

    settings = Settings(
        num_images_per_prompt=cfg.num_images_per_prompt,
        num_inference_steps=cfg.num_inference_steps,
        guidance_scale=cfg.guidance_scale,
        timesteps_per_sample=cfg.timesteps_per_sample,
        fid_samples=cfg.fid_samples,
        false_copies=cfg.false_copies,
        nearest=cfg.nearest,
        gallery=cfg.gallery,
        seed=cfg.seed,
        attack=instantiate(cfg.attack),
    )
    room.names_of(models, loras)  # here: a model that is named twice costs nothing yet
    samples, measures = _samples(cfg), _measures(cfg)
    chosen = choose(samples, cfg.samples.file, cfg.samples.group, cfg.samples.count, cfg.seed)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    out, plain = Path(cfg.out).expanduser(), OmegaConf.to_container(cfg, resolve=True)
    load = None if distributor == Local() else partial(_loaded, plain)  # this process has loaded the model anyway
    spread = room.ModelsSpread(distributor, load, part, cfg.merge)
    with Progress(*columns, transient=True) as progress:
        results = room.evaluate(
            models,
            samples,
            chosen,
            measures,
            settings,
            out,
            batch_size=cfg.batch_size,
            device=cfg.device,
            dtype=cfg.dtype,
            draw=write_gallery,
            loras=loras,
            as_trained=as_trained(cfg),
            config=cfg.config,
            advance=_bars(progress),
            spread=spread,
        )
    if spread.part.count > 1:
        print(f"{out}: part {spread.part}, {len(results)} models; `merge` makes the table of all parts")
        return
    _write(out, results)
    _print(results, out)


def _models(cfg: DictConfig) -> list[str]:
    models = OmegaConf.to_container(cfg, resolve=True).get("models")
    models = [models] if isinstance(models, str) else models
    if not isinstance(models, list) or not models or not all(isinstance(model, str) for model in models):
        raise ValueError("no model; name one with model=PATH, or several with models=[A,B,…]: folders or hub ids")
    return models


def _loras(cfg: DictConfig, models: list[str]) -> list[str | None]:
    """The adapter of each model, or None."""
    lora = OmegaConf.to_container(cfg, resolve=True)["lora"]
    if not isinstance(lora, list):
        return [lora] * len(models)
    if len(lora) != len(models) or not all(one is None or isinstance(one, str) for one in lora):
        raise ValueError(f"lora names {len(lora)} adapters for {len(models)} models; name one for each, or null")
    return lora


def _loaded(plain: dict, source: str, lora: str | None) -> tuple[Denoiser, ShardSamples, Measures]:
    """A model, the samples and the measures that a config names; of each worker its own."""
    from memtrain.audit.denoiser import Denoiser
    from memtrain.models.folders import is_file

    cfg = OmegaConf.create(plain)
    config = cfg.config if is_file(source) else None
    denoiser = Denoiser.load(source, cfg.device, cfg.dtype, lora=lora, config=config, as_trained=as_trained(cfg))
    return denoiser, _samples(cfg), _measures(cfg)


def _samples(cfg: DictConfig) -> ShardSamples:
    from memtrain.data.samples import ShardSamples

    shards = OmegaConf.to_container(cfg.data, resolve=True)["shards"]
    return ShardSamples(shards, _CHECKED_SIDE, cfg.data.caption, cfg.data.where, cfg.data.cache_dir)


def _measures(cfg: DictConfig) -> Measures:
    import torch

    from memtrain.audit.alignment import ClipScore
    from memtrain.audit.batches import ShrinkingBatches
    from memtrain.audit.evaluate.fid import LatentGrid, ScriptFeatures
    from memtrain.audit.evaluate.settings import Measures
    from memtrain.audit.evaluate.similarity import LatentRmse, Sscd
    from memtrain.audit.margin import CaptionMargin

    batches, judge = ShrinkingBatches(cfg.batch_size), load_judge(cfg)
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Measures(
        similarity=Sscd(cfg.sscd, device, cfg.sscd_resize, cfg.min_sscd) if cfg.sscd else LatentRmse(cfg.max_rmse),
        features=ScriptFeatures(cfg.fid, device) if cfg.fid else LatentGrid(),
        alignment=ClipScore(cfg.clip, device) if cfg.clip else None,
        margin=None if judge is None else CaptionMargin(judge, batches),
    )


def _bars(progress) -> Callable[[str, int, int], None]:
    """A bar for each thing that is done, shown while it is done."""
    tasks: dict[str, int] = {}

    def advance(what: str, done: int, total: int) -> None:
        if what not in tasks:
            for task in tasks.values():
                progress.update(task, visible=False)
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done)

    return advance


def _write(out: Path, results: list[ModelResult]) -> None:
    """The rows of all models, the table, and the plane."""
    import pyarrow.parquet as pq

    from memtrain.audit.evaluate.several_models import read_rows
    from memtrain.core.files import json_of, written_aside
    from memtrain.report.plane import Point, draw_plane

    with written_aside(out / "rows.parquet", shared=True) as aside:
        pq.write_table(read_rows(out, results), aside, compression="zstd")
    with written_aside(out / "evaluation.json", shared=True) as aside:
        aside.write_text(json_of([asdict(result) for result in results]) + "\n", encoding="utf-8")
    with written_aside(out / "evaluation.csv", shared=True) as aside:
        _write_csv(aside, results)
    has_reference = results[0].heldout_loss is not None
    points = []
    for result in results:
        quality = result.heldout_loss if has_reference else result.memorization.denoising_loss
        if quality is None or not math.isfinite(quality):
            log.warning("%s: its loss is not finite; it has no place in plane.png", result.model)
            continue
        points.append(Point(result.model, result.memorization.copy_rate, quality))
    if not points:
        return
    first = results[0]
    rule = f" ({first.copy_rule})" if all(result.cut == first.cut for result in results) else ""
    shown = f"copies, {first.memorization.group}{rule}"
    loss = "held-out loss" if has_reference else "denoising loss of these samples (no group reference)"
    with written_aside(out / "plane.png", shared=True) as aside:
        draw_plane(aside, points, shown, loss)


def _write_csv(path: Path, results: list[ModelResult]) -> None:
    """A line a model and group; what is said of the model stands in each of its lines."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = None
        for result in results:
            of_model = {name: value for name, value in asdict(result).items() if name != "groups"}
            for group in result.groups:
                line = {**of_model, **asdict(group)}
                writer = writer or csv.DictWriter(stream, list(line))
                if stream.tell() == 0:
                    writer.writeheader()
                writer.writerow(line)


def _print(results: list[ModelResult], out: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    first = results[0]
    has_clip = any(group.clip_score is not None for group in first.groups)
    has_margin = any(group.caption_margin is not None for group in first.groups)
    has_distances = any(result.frechet_distance is not None for result in results)
    is_attacked = first.memorization.copy_rate_attacked is not None
    title = "Copies of a generation's own picture (95 %\nover samples), and "
    title += "under attack" if is_attacked else "of any training picture"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    models, groups = [result.model for result in results], [group.group for group in first.groups]
    for name, cells in (("model", models), ("group", groups)):
        table.add_column(name, overflow="fold", min_width=min(10, max(map(len, cells))))
    # the table fits 80 columns: an attack takes the place of what evaluation.csv has, too
    has_reach = first.attack_reach is not None
    under_attack = ("under attack", *(("beyond reach",) if has_reach else ()))
    figures = ("samples", "copies", *(under_attack if is_attacked else ("of any", "samples copied")))
    figures += (first.measure, "nearest")
    figures += (
        *(("CLIP score",) if has_clip else ()),
        *(("margin",) if has_margin else ()),
        "loss",
        *((first.frechet_name.split()[0], "kernel") if has_distances else ()),  # FID, or Fréchet
    )
    for name in figures:
        table.add_column(_HEADS.get(name, name), justify="right", overflow="fold")
    for result in results:
        for number, group in enumerate(result.groups):
            attacked = (group.copy_rate_attacked, group.copy_rate_attacked_low, group.copy_rate_attacked_high)
            cells = [
                escape(result.model) if number == 0 else "",
                escape(group.group),
                f"{group.samples}",
                _with_interval(group.copy_rate, group.copy_rate_low, group.copy_rate_high),
                *(
                    [_with_interval(*attacked), *([f"{group.copy_rate_beyond_reach:.1%}"] if has_reach else [])]
                    if is_attacked
                    else [f"{group.copy_rate_nearest:.1%}", f"{group.samples_copied:.1%}"]
                ),
                f"{group.similarity:.3f}",
                f"{group.similarity_nearest:.3f}",
            ]
            if has_clip:
                cells.append(f"{group.clip_score:.2f}")
            if has_margin:
                cells.append(f"{group.caption_margin:+.1%}")
            cells.append(f"{group.denoising_loss:.4f}")
            for distance in (result.frechet_distance, result.kernel_distance) if has_distances else ():
                cells.append("" if distance is None or number else f"{distance:.3g}")
            table.add_row(*cells, end_section=number == len(result.groups) - 1)
    console = Console()
    console.print(table)
    notes = [
        f"A copy{f' of {result.model}' if len(results) > 1 else ''}: {result.copy_rule}, {result.cut_is}; "
        f"{result.searched} training pictures searched."
        for result in results
    ]
    if is_attacked:
        notes.append(
            f"Under attack: generations after {first.attack}. What it brings back of the group reference, which was "
            "never trained on, it has described by itself."
        )
    if has_reach:
        notes += [
            f"Beyond reach{f' of {result.model}' if len(results) > 1 else ''}: under attack, within "
            f"{result.attack_reach:.3g}. So near it does not come to what was never trained on: this was learnt."
            for result in results
            if result.attack_reach is not None
        ]
    notes.append("Nearest: 5 % of the generations are as near to a training picture.")
    notes += ["Loss: of denoising the training image at fixed noise; of the group reference, the held-out loss."]
    if has_margin:
        notes.append(
            "Margin: by how much a caption lowers the judge's loss on its generation; 0 or less: it is not shown."
        )
    if first.frechet_distance is not None:
        notes.append(
            f"{first.frechet_name}: {first.frechet_generated} generations against {first.frechet_real} "
            "pictures of the shards; comparable between the models of one table alone. Kernel: the unbiased kernel "
            "distance (KID) of the same features; about 0 where both are alike."
        )
    notes.append(f"{out}: evaluation.json, evaluation.csv, rows.parquet, plane.png, MODEL/gallery.html")
    for line in notes:
        console.print(escape(line))


def _with_interval(rate: float, low: float | None, high: float | None) -> str:
    """A share, and below it its interval in percent."""
    return f"{rate:.1%}" if low is None or high is None else f"{rate:.1%}\n{100 * low:.0f}-{100 * high:.0f}"
