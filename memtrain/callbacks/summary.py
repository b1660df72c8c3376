"""What a run came to: `summary.json`, `curves.png`, and a table on the terminal."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table

from memtrain.callbacks.copies import Copies
from memtrain.callbacks.curves import MemorizationCurves
from memtrain.callbacks.guard import on_first_rank
from memtrain.callbacks.logging import log_picture
from memtrain.core.exclusion import CANARY, GROUP_NAMES, REFERENCE, SACRIFICED, TRAINED
from memtrain.report.copies import as_json, nearest_quantile, rates_by_group, rates_by_kind
from memtrain.report.curves import draw_curves
from memtrain.training.stop_early import StopEarly

GROUPS_COPIED = ("canary", "reference", "sacrificed")


class Summary(pl.Callback):
    """Writes and prints what the other callbacks measured, so it comes after them; null is what nothing measured."""

    ended = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = self.trained_until = time.perf_counter()
        self.samples_before = pl_module.accumulation.samples_seen

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.trained_until = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            logger.save()
        self.ended = True
        self._write(trainer, pl_module)

    @on_first_rank
    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        summary = self.summarize(trainer, pl_module)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print_summary(summary)
        if (folder / "metrics.csv").exists():
            looks = (summary["copies"] or {}).get("looks", {})
            draw_curves(folder / "metrics.csv", folder / "curves.png", looks)
            log_picture(trainer, "curves", folder / "curves.png")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say where the results lie, when the other callbacks, too, have written what they write at the end."""
        if self.ended and trainer.is_global_zero:
            print_files(Path(trainer.default_root_dir))

    def summarize(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict:
        """What goes into `summary.json`."""

        def figure(name: str) -> float | None:
            value = trainer.callback_metrics.get(name)
            return None if value is None else _or_none(value.item())

        second = pl_module.scoring.second
        groups = trainer.datamodule.groups
        curves = next((c for c in trainer.callbacks if isinstance(c, MemorizationCurves)), None)
        copies = next((c for c in trainer.callbacks if isinstance(c, Copies)), None)
        early = next((c for c in trainer.callbacks if isinstance(c, StopEarly) and c.patience is not None), None)
        seconds = max(self.trained_until - self.started, 1e-9)  # validation included, what follows the last step not
        return {
            "steps": trainer.global_step,
            "samples_seen": pl_module.accumulation.samples_seen,
            "updates_skipped": pl_module.accumulation.updates_skipped,
            "scaler_backoffs": pl_module.accumulation.scaler_backoffs,
            "samples_per_second": (pl_module.accumulation.samples_seen - self.samples_before) / seconds,
            "heldout_loss": figure("heldout_loss"),
            "weights_of_step": early.step if early else trainer.global_step,
            "score": {
                GROUP_NAMES[group]: {
                    "mean": figure(f"val_score/{GROUP_NAMES[group]}"),
                    "mean_at_high_noise": figure(f"val_score_high_noise/{GROUP_NAMES[group]}"),
                    "excluded_fraction": _or_none(curves.excluded_fraction(group)) if curves else None,
                    "excluded_by_timestep_second_half": (
                        [_or_none(share) for share in curves.excluded_by_timestep(group)] if curves else None
                    ),
                }
                for group in (CANARY, TRAINED, REFERENCE, SACRIFICED)
            },
            "canaries": {
                name: {"pictures": len(groups.one_each(positions)), "samples": len(positions)}
                for name, positions in (("canary", groups.canary), ("sacrificed", groups.sacrificed))
            },
            "auc_canary_vs_reference": figure("auc_canary_vs_reference"),
            "tpr_at_1pct_fpr": figure("tpr_at_1pct_fpr"),
            "rule_score": pl_module.scoring.rule,
            "second_score": None
            if second is None
            else {
                "name": second,
                "auc_canary_vs_reference": figure(f"{second}_auc_canary_vs_reference"),
                "mean_at_high_noise": {
                    GROUP_NAMES[group]: figure(f"{second}_val_score_high_noise/{GROUP_NAMES[group]}")
                    for group in (CANARY, TRAINED, REFERENCE, SACRIFICED)
                },
            },
            "copy_rate": {name: figure(f"copy_rate/{name}") for name in GROUPS_COPIED},
            "copy_rmse": {name: figure(f"copy_rmse/{name}") for name in GROUPS_COPIED},
            "copies": summarize_copies(copies, trainer) if copies and copies.rows else None,
            "memorized_at": copies.memorized_at(trainer) if copies else None,
            "scoring_share": _or_none(curves.scoring_share) if curves else None,
            "bad_samples": trainer.datamodule.problems_by_cause(),
        }


def summarize_copies(copies: Copies, trainer: pl.Trainer) -> dict:
    """What a copy was, and rates with their intervals: against a generation's own picture, and against all."""
    cut, rows = copies.cut, copies.counted()
    nearest = rates_by_group(rows, cut.distance)
    by_group = {group: [row for row in rows if row.group == group] for group in nearest}
    return {
        "cut": cut.distance,
        "cut_is": cut.why,
        "max_rmse": cut.bound,
        "false_copies": cut.false_copies,
        "reference_generations": cut.generations,
        "training_pictures": {"searched": copies.searched.pictures, "all": copies.searched.of_pictures},
        "min_repeats": copies.min_repeats,
        "intervals": "95 %, by bootstrap over canaries (of the reference set: captions)",
        "own": {group: asdict(rate) for group, rate in rates_by_group(rows).items()},
        "nearest": {
            group: {
                **asdict(rate),
                "rmse_5th_percentile": nearest_quantile(by_group[group]),
            }
            for group, rate in nearest.items()
        },
        "kinds": {kind: asdict(rate) for kind, rate in rates_by_kind(rows).items()},
        "doses": {kind: as_json(curve) for kind, curve in copies.doses.items()},
        "looks": copies.curves(trainer),
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def print_summary(summary: dict) -> None:
    """Print the figures that matter most as a table."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    table = Table(title=f"{summary['steps']} steps, {summary['samples_seen']} samples seen", title_justify="left")
    table.add_column("")
    for group in ("canary", "train", "reference"):
        table.add_column(group, justify="right")
    scores = [summary["score"][group] for group in ("canary", "train", "reference")]
    table.add_row("score, all timesteps", *(show(s["mean"], ".3f") for s in scores))
    table.add_row("score, high noise", *(show(s["mean_at_high_noise"], ".3f") for s in scores))
    second = summary["second_score"]
    if second is not None:
        means = (second["mean_at_high_noise"][group] for group in ("canary", "train", "reference"))
        table.add_row(f"{second['name']} score, high noise", *(show(mean, ".3f") for mean in means))
    table.add_row("excluded (reference: would be)", *(show(s["excluded_fraction"], ".1%") for s in scores))
    copies, canaries = summary["copy_rate"], summary["canaries"]
    table.add_row("generations that are copies", show(copies["canary"], ".1%"), "", show(copies["reference"], ".1%"))
    judged = summary["copies"]
    if judged is not None:
        nearest = (judged["nearest"].get(group, {}).get("rate") for group in ("canary", "reference"))
        of_canary, of_reference = (show(rate, ".1%") for rate in nearest)
        table.add_row("copies of any training picture", of_canary, "", of_reference)
    console = Console()
    console.print(table)
    console.print(
        f"held-out loss {show(summary['heldout_loss'], '.4f')}   "
        f"AUC canary against reference {show(summary['auc_canary_vs_reference'], '.3f')}   "
        f"updates skipped {summary['updates_skipped']}   {summary['samples_per_second']:.0f} samples/s"
    )
    if summary["weights_of_step"] != summary["steps"]:
        console.print(f"the weights are those of step {summary['weights_of_step']}, whose held-out loss was the lowest")
    if judged is not None:
        console.print(f"a copy: RMSE of latents ≤ {judged['cut']:.3f}, {judged['cut_is']}")
        low, high = (judged["own"].get("canary", {}).get(bound) for bound in ("low", "high"))
        if low is not None:
            console.print(f"copies of canaries {copies['canary']:.1%}, 95 % over canaries {low:.1%} to {high:.1%}")
    repeated = canaries["canary"]
    if repeated["samples"] > repeated["pictures"]:
        console.print(f"a canary is a picture: {repeated['pictures']} of them, {repeated['samples']} samples")
    if copies["sacrificed"] is not None:
        console.print(
            f"the exported model draws the sacrificed canaries ({canaries['sacrificed']['pictures']}, never excluded): "
            f"{copies['sacrificed']:.1%} of the generations from their captions are copies"
        )


def print_files(folder: Path) -> None:
    """Print where the run's results lie."""
    for name, what in (
        ("curves.png", "curves"),
        ("samples.png", "samples"),
        ("copies.csv", "copies"),
        ("doses.png", "doses"),
        ("memorized.png", "memorized"),
        ("summary.json", "summary"),
        ("export", "weights"),
    ):
        if (folder / name).exists():
            print(f"{what:10}{folder / name}")
