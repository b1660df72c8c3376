"""`memtrain explain`: load model and prompts, explain, write chart, page and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from memtrain.audit.prompts import read_prompts
from memtrain.cli.audited import load_audited
from memtrain.cli.checks import check_explanation


def explain(cfg: DictConfig) -> None:
    check_explanation(cfg)
    texts = prompt_texts(cfg)
    from memtrain.audit.explain import explanation as audit
    from memtrain.report.tokens import draw_significance, write_page

    sampling = dict(
        num_images_per_prompt=cfg.num_images_per_prompt,
        steps=list(cfg.steps),
        num_inference_steps=cfg.num_inference_steps,
        guidance_scale=cfg.guidance_scale,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
    )
    denoiser = load_audited(cfg)
    sampling["guidance_scale"] = denoiser.guidance_scale
    found = audit.explain(
        denoiser, texts, **sampling, suggest=cfg.suggest_words if cfg.suggest else 0, progress=progress_bar
    )
    checks = audit.check_words(denoiser, found, **sampling) if cfg.check else []
    out = Path(cfg.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    for number, explanation in enumerate(found[: cfg.charts]):
        draw_significance(out / f"{number:03d}.png", explanation)
    write_page(out / "explain.html", found, "What makes the score")
    written = {"model": cfg.model.pretrained, "lora": cfg.lora, **sampling, "prompts": [asdict(one) for one in found]}
    if cfg.check:
        written["check"] = [{**asdict(one), "holds": one.holds} for one in checks]
    (out / "explain.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    _print(found, checks, cfg)
    print(f"\n{out}: explain.html, explain.json, 000.png …")


def prompt_texts(cfg: DictConfig) -> list[str]:
    """`prompt`, or the prompts of a file; where it has labels, those that are memorized."""
    if (cfg.prompt is None) == (cfg.prompts is None):
        raise ValueError('say prompt="…" or prompts=FILE, one of the two')
    if cfg.prompt is not None:
        return [cfg.prompt]
    prompts = read_prompts(cfg.prompts, cfg.column, cfg.label)
    return prompts.texts if prompts.labels is None else labelled(prompts, memorized=True)


def labelled(prompts, memorized: bool) -> list[str]:
    """The prompts of one label. Raises ValueError where there are none."""
    texts = [text for text, label in zip(prompts.texts, prompts.labels, strict=True) if label == memorized]
    if not texts:
        raise ValueError(f"{prompts.source} labels no prompt as {'memorized' if memorized else 'other'}")
    return texts


def progress_bar(items: Iterable, total: int) -> Iterable:
    """A bar on stderr with an estimate, where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, "", total, console=console, disable=total < 2 or not console.is_terminal)


def _print(found: Sequence, checks: Sequence, cfg: DictConfig) -> None:
    from rich.console import Console

    from memtrain.cli.shards import shown

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if cfg.check:
        return _print_checks(console, checks)
    for explanation in found[: cfg.shown]:
        console.print(f"{shown(explanation.prompt) or '(the empty prompt)'}\n  score {explanation.score:.3f}")
        for word in explanation.ranked()[: cfg.shown]:
            console.print(f"  {word.significance:8.4f}  {shown(word.text, 40)}")
        for edit in explanation.edits:
            console.print(f"  {edit.score:8.3f}  {shown(edit.prompt)}")
    if len(found) > cfg.shown:
        console.print(f"… and {len(found) - cfg.shown} more prompts")
    return None


def _print_checks(console, checks: Sequence) -> None:
    from rich.markup import escape
    from rich.table import Table

    from memtrain.cli.shards import shown

    table = Table("prompt", "score", "top word", "without it", "bottom word", "without it", "holds")
    for one in checks:
        table.add_row(
            escape(shown(one.prompt, 80)),
            f"{one.score:.3f}",
            escape(shown(one.top, 40)),
            f"{one.score_without_top:.3f}",
            escape(shown(one.bottom, 40)),
            f"{one.score_without_bottom:.3f}",
            "yes" if one.holds else "no",
        )
    console.print(table)
    held = sum(one.holds for one in checks)
    share = f" ({held / len(checks):.0%})" if checks else ""
    console.print(
        f"dropping the top word lowers the score more than dropping the bottom one: {held} of {len(checks)}{share}"
    )
