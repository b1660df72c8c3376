"""A run's folder, read for the report. What is missing is a remark, not an error: the run may be going on."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from memtrain.core.dose import DoseCurve
from memtrain.core.scores import MAGNITUDE
from memtrain.data.copies_file import read_copies
from memtrain.data.escaping import of_cell
from memtrain.data.paths import check_run, config_folder
from memtrain.report.copies import doses_by_kind
from memtrain.report.curves import Curve, read_metrics
from memtrain.report.ledger import LedgerView, view_ledger


@dataclass(frozen=True)
class Run:
    """What one run wrote so far."""

    folder: Path
    name: str
    config: dict[str, Any]  # {} where there is none
    curves: dict[str, Curve]  # column of metrics.csv -> steps and values
    summary: dict[str, Any]  # {} while the run is going on
    canaries: dict[str, dict[str, str]]  # key -> its row of canaries.csv
    ledger: LedgerView | None
    remarks: list[str] = field(default_factory=list)
    doses: dict[str, DoseCurve] = field(default_factory=dict)  # of all canaries, of kinds where several

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def step(self) -> int:
        """The newest step that anything was written at."""
        return max((steps[-1] for steps, _ in self.curves.values()), default=0)

    @property
    def rule(self) -> str:
        """The exclusion rule as it is chosen in the config; of one's own rule, the class."""
        target = str(self.config.get("exclusion", {}).get("_target_", "unknown"))
        return rule_names().get(target, target.rsplit(".", 1)[-1])

    @property
    def score(self) -> str:
        """The score that the rule goes by."""
        return self.config.get("score", {}).get("rule", MAGNITUDE)

    @property
    def method(self) -> str:
        return str(self.config.get("method", {}).get("_target_", "Method")).rsplit(".", 1)[-1]

    @property
    def unprotected(self) -> bool:
        """Whether neither a rule nor a method keeps the run from memorizing."""
        return self.rule == "none" and self.method == "Method"

    def first(self, column: str) -> float | None:
        """The first value of a column, that of the untrained model where it was validated at step 0."""
        return self.curves[column][1][0] if column in self.curves else None

    def last(self, column: str) -> float | None:
        """The newest value of a column."""
        return self.curves[column][1][-1] if column in self.curves else None

    def copy_rate(self, group: str) -> float | None:
        return self.last(f"copy_rate/{group}")

    def excluded(self, group: str) -> float | None:
        """The excluded share of a group's visits: over the run; while it is going on, at the newest point."""
        found = self.summary.get("score", {}).get(group, {}).get("excluded_fraction")
        return self.last(f"excluded/{group}") if found is None else found

    @property
    def copies(self) -> dict[str, Any]:
        """What a copy was, and rates with their intervals; {} while the run is going on, and of older runs."""
        return self.summary.get("copies") or {}

    @property
    def memorized_at(self) -> dict[str, int | None]:
        """Key of each canary looked at -> the step at which half of its generations were first copies."""
        return self.summary.get("memorized_at") or {}

    def samples_per_second(self) -> float | None:
        return self.summary.get("samples_per_second") or self.last("samples_per_second")


@cache
def rule_names() -> dict[str, str]:
    """The class of each exclusion rule, by its path -> the name under which it is chosen, its file in conf/."""
    files = {file.stem: OmegaConf.load(file) for file in sorted((config_folder() / "exclusion").glob("*.yaml"))}
    return {file["_target_"]: name for name, file in files.items() if "_target_" in file}  # others vary one of these


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: it is not one.
    """
    folder = check_run(folder)
    remarks: list[str] = []
    config = _config(folder / "config.yaml", remarks)
    curves: dict[str, Curve] = {}
    if (folder / "metrics.csv").is_file():
        curves = read_metrics(folder / "metrics.csv")
    if not curves:
        remarks.append("No curves: metrics.csv is missing or empty (logger=csv writes it).")
    summary: dict[str, Any] = {}
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    # looks in the middle were logged before the run knew what a copy is
    curves |= {
        name: (steps, values) for name, (steps, values) in (summary.get("copies") or {}).get("looks", {}).items()
    }
    canaries: dict[str, dict[str, str]] = {}
    if (folder / "canaries.csv").is_file():
        with (folder / "canaries.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = [{name: of_cell(text) for name, text in row.items()} for row in csv.DictReader(file)]
        canaries = {row["key"]: row for row in rows}
    ledger = view_ledger(folder)
    if ledger is None:
        remarks.append("No ledger: nothing is known of single samples here (it was off, or has not been closed yet).")
    else:
        remarks += ledger.remarks
    name = f"{folder.parent.name}/{folder.name}"
    return Run(folder, name, config, curves, summary, canaries, ledger, remarks, _doses(folder / "copies.csv", remarks))


def _doses(path: Path, remarks: list[str]) -> dict[str, DoseCurve]:
    """The curves of copies by repeats; where the file cannot be read {}, with a remark."""
    if not path.is_file():
        return {}
    try:
        return doses_by_kind(read_copies(path))
    except (OSError, ValueError) as error:
        remarks.append(f"No copies by repeats: {error}.")
        return {}


def _config(path: Path, remarks: list[str]) -> dict[str, Any]:
    """A run's config; where it cannot be read {}, with a remark."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError, OmegaConfBaseException):
        config = None
    if not isinstance(config, dict):
        remarks.append("No settings: config.yaml is missing or cannot be read.")
        return {}
    return config


def settings(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A config as `a.b.c` -> value, in its order."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if value is None else str(value)
    return flat
