"""One way to log a number, histogram, table or picture to every logger, and to share lists between ranks.

Names are those of metrics.csv. W&B and TensorBoard make a section of a name's first part and show sections in
alphabetical order; so there each name comes behind its section: `a_memorized/copy_rate/canary`.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from memtrain.core.files import written_aside
from memtrain.core.scores import SCORES
from memtrain.training.score_memory import Scoring

log = logging.getLogger(__name__)

SECTIONS = {  # what comes first is looked at first; a name belongs where one of the words begins it
    "a_memorized": ("copy_", "memorized", "auc_", "tpr_"),
    "b_excluded": ("excluded/", "updates_skipped"),
    "c_loss": ("heldout_loss", "loss", "val_loss"),
    "d_score": ("score/", "score_high_noise", "score_quantile", "val_score", *(f"{score}_" for score in SCORES)),
    "e_by_timestep": ("score_by_", "threshold_by_", "excluded_by_"),
    "f_histograms": ("score_histogram",),
    "g_pictures": ("samples", "curves"),
    "h_speed": ("samples_per_second", "scoring_share", "learning_rate"),
}
INIT_PATIENCE, FINISH_PATIENCE = 30.0, 60.0  # seconds, for a W&B that does not answer
SAMPLES_SEEN = "samples_seen"  # the other x-axis; in every row, and in no section


def dashboard_name(name: str) -> str:
    """The name of a metric in W&B and TensorBoard: behind its section."""
    if name == SAMPLES_SEEN:
        return name
    fitting = {word: section for section, words in SECTIONS.items() for word in words if name.startswith(word)}
    section = fitting[max(fitting, key=len)] if fitting else "i_other"
    return f"{section}/{name}"


def prefixes_of(scoring: Scoring) -> list[str]:
    """What the names of a score's metrics begin with: nothing for the one that the rule goes by, and the second's."""
    return [""] if scoring.second is None else ["", f"{scoring.second}_"]


def log_metrics(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Write numbers at the current step to all loggers, and remember them in `trainer.callback_metrics`.

    Each row also says how many samples all ranks have seen, so that it can be the x-axis.
    """
    metrics = {SAMPLES_SEEN: float(trainer.lightning_module.accumulation.samples_seen)} | metrics
    trainer.callback_metrics.update({name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()})
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger | TensorBoardLogger):
            logger.log_metrics({dashboard_name(n): v for n, v in metrics.items()}, step=trainer.global_step)
        else:
            logger.log_metrics(metrics, step=trainer.global_step)


def log_histograms(trainer: pl.Trainer, histograms: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write histograms at the current step to W&B and TensorBoard: by name, counts (N,) and edges (N + 1,)."""
    if not trainer.is_global_zero or not histograms:
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            logger.log_metrics(
                {
                    dashboard_name(name): wandb.Histogram(np_histogram=(counts.numpy(), edges.numpy()))
                    for name, (counts, edges) in histograms.items()
                },
                step=trainer.global_step,
            )
        elif isinstance(logger, TensorBoardLogger):
            for name, (counts, edges) in histograms.items():
                centres = (edges[:-1] + edges[1:]) / 2
                logger.experiment.add_histogram_raw(
                    dashboard_name(name),
                    min=edges[0].item(),
                    max=edges[-1].item(),
                    num=counts.sum().item(),
                    sum=(counts * centres).sum().item(),
                    sum_squares=(counts * centres.square()).sum().item(),
                    bucket_limits=edges[1:].tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=trainer.global_step,
                )


def log_picture(trainer: pl.Trainer, name: str, path: Path) -> None:
    """Send a PNG that lies in the run's folder to the loggers that hold pictures."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(dashboard_name(name), [str(path)], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            logger.experiment.add_image(dashboard_name(name), pixels, trainer.global_step, dataformats="HWC")


def log_table(trainer: pl.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Send a table to W&B; a cell that is an (R, R, 3) array is shown as a picture, any text as plain text."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            import wandb

            cells = [[wandb.Image(c) if isinstance(c, np.ndarray) else c for c in row] for row in rows]
            name, step = dashboard_name(name), trainer.global_step
            logger.log_table(name, columns=list(columns), data=cells, step=step)


class MetricsFile(Logger):
    """Writes `metrics.csv` in the run's folder (`logger=csv`): a row a point, empty where a column has no value.

    A row is on disk at once, appended. A column that is new has the file written anew, aside and renamed, so
    that whoever reads sees whole rows. A run that goes on in the same folder keeps the rows before its first.
    """

    def __init__(self, save_dir: str):
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: they are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step} | metrics
        first = self._columns is None
        if not first and all(name in self._columns for name in row):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
            return
        columns, rows = self._read()
        if first:
            rows = [old for old in rows if int(old["step"]) < step]
        self._columns = list(dict.fromkeys([*columns, *row]))
        with written_aside(self.path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows([*rows, row])

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.path.exists():
            return [], []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)


def wandb_logger(project: str, mode: str, name: str, save_dir: str) -> WandbLogger:
    """Begin a W&B run in the run's folder. `mode`: offline (the default; `wandb sync` sends it later) or online.

    Where W&B cannot be reached at the start the run is an offline one; where it is lost later, training goes on,
    and the run's end waits no longer than `FINISH_PATIENCE`: what was not sent lies in the run's folder.
    Curves are drawn over steps; `samples_seen` can be chosen as the x-axis of a panel or of the workspace.
    """
    if mode not in ("offline", "online"):
        raise ValueError(f"logger.wandb.mode must be offline or online, got {mode}; or use logger=csv")
    import wandb

    Path(save_dir).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_SILENT", "true")
    patience = wandb.Settings(init_timeout=INIT_PATIENCE, finish_timeout=FINISH_PATIENCE)

    def start(offline: bool) -> WandbLogger:
        mode = "offline" if offline else "online"  # said to W&B, too: what it read from the environment is old
        options = dict(project=project, name=name, save_dir=save_dir, offline=offline)
        logger = WandbLogger(**options, mode=mode, settings=patience)
        logger._wandb_init.pop("anonymous", None)  # Lightning passes it even when it is not set, and wandb warns
        logger.experiment.define_metric(SAMPLES_SEEN, step_metric="trainer/global_step", summary="max", hidden=True)
        return logger

    if mode == "online":
        try:
            return start(offline=False)
        except wandb.errors.CommError as error:
            why = str(error).splitlines()[0]
            log.warning("W&B cannot be reached (%s): an offline run, `wandb sync` in %s sends it later", why, save_dir)
    return start(offline=True)


def share_of_rank(trainer: pl.Trainer, items: list) -> list:
    """This rank's share of the items: every world_size-th, so that all ranks together have all."""
    return items[trainer.global_rank :: trainer.world_size]


def from_all_ranks(trainer: pl.Trainer, items: list) -> list:
    """The items of all ranks, rank by rank, on every rank. For a few rows at a time: they are pickled."""
    if trainer.world_size == 1:
        return items
    parts: list = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
