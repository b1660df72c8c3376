"""Runs side by side: a table, and the settings in which they differ."""

from __future__ import annotations

from memtrain.report.run import Run, settings

COLUMNS = (
    "run",
    "rule",
    "copy rate, canaries",
    "copy rate, reference",
    "excluded, canaries",
    "excluded, others",
    "held-out loss",
    "against {baseline}",
    "AUC at high noise",
    "look memorized",
    "steps",
    "samples/s",
)
# what every run has of its own
_OWN = ("run_id", "run_dir", "name", "callbacks.checkpoint.folder")


def _show(value: float | None, form: str) -> str:
    """A number in this format; a dash where there is none."""
    return "–" if value is None else format(value, form)


def table(runs: list[Run], baseline: Run) -> tuple[list[str], list[list[str]]]:
    """Headings and a row a run. Every cell is text."""
    return [column.format(baseline=baseline.name) for column in COLUMNS], [_row(run, baseline) for run in runs]


def _row(run: Run, baseline: Run) -> list[str]:
    loss, other = run.last("heldout_loss"), baseline.last("heldout_loss")
    against = None if run is baseline or loss is None or not other else loss / other - 1
    memorized = run.ledger.memorized("train") if run.ledger else None
    return [
        run.name + ("" if run.finished else " (not finished)"),
        run.rule if run.method == "Method" else f"{run.rule}, {run.method}",
        _with_interval(run),
        _show(run.copy_rate("reference"), ".1%"),
        _show(run.excluded("canary"), ".1%"),
        _show(run.excluded("train"), ".1%"),
        _show(loss, ".4f"),
        _show(against, "+.1%"),
        _show(run.last("auc_canary_vs_reference"), ".3f"),
        _show(None if memorized is None else len(memorized), "d"),
        str(run.step),
        _show(run.samples_per_second(), ".0f"),
    ]


def _with_interval(run: Run) -> str:
    """The copy rate of canaries, with its interval over these canaries where it is known: no spread over seeds."""
    own = run.copies.get("own", {}).get("canary", {})
    interval = f" ({100 * own['low']:.0f} to {100 * own['high']:.0f})" if own.get("low") is not None else ""
    return _show(run.copy_rate("canary"), ".1%") + interval


def differences(runs: list[Run]) -> list[list[str]]:
    """The settings in which the runs differ: key, and its value in each run."""
    flat = [settings(run.config) for run in runs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    rows = [[key, *(config.get(key, "–") for config in flat)] for key in keys if key not in _OWN]
    folders = [str(run.config.get("run_dir")) for run in runs]

    def told(row: list[str]) -> set[str]:
        return {value.replace(folder, "…") for value, folder in zip(row[1:], folders, strict=True)}

    return [row for row in rows if len(told(row)) > 1]
