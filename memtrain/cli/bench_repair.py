"""`memtrain bench repair`: repair each model by each method, evaluate it before and after, write the table."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from memtrain.cli.arguments import spelled
from memtrain.cli.bench_mitigation import check_into, made_by
from memtrain.cli.evaluate import evaluate
from memtrain.cli.repair import FOLDER, WRITTEN, repair
from memtrain.core.files import written_aside
from memtrain.data.paths import check_run
from memtrain.report.repair_table import BEFORE, RepairFigures, read_figures, write
from memtrain.sweep.protocol import trained_as

log = logging.getLogger(__name__)

_A_ROW = 3  # forward passes of a row that is trained on: forward and backward; that of a score is not counted
_RECORD = "bench.json"  # in a repair's folder: what it was begun with


def bench_repair(cfg: DictConfig) -> None:
    given = OmegaConf.to_container(cfg, resolve=True)
    rows = {name: words for name, words in given["rows"].items() if name in (given["only"] or given["rows"])}
    unknown = [name for name in given["only"] or () if name not in rows]
    if unknown:
        raise ValueError(f"only={unknown[0]}: there is no such row; there are {', '.join(given['rows'])}")
    folders = [given["runs"]] if isinstance(given["runs"], str) else given["runs"]
    runs = [check_run(Path(folder).expanduser()) for folder in folders]
    into = None if cfg.into is None else Path(cfg.into).expanduser()
    if into is not None:
        check_into(into, "repair")
    from memtrain.audit.evaluate.several_models import short_names

    models = [_Model(run, name, cfg) for run, name in zip(runs, short_names([str(run) for run in runs]), strict=True)]
    out, found = Path(cfg.out).expanduser(), list[RepairFigures]()
    for row, words in rows.items():
        for model in models:
            _check_record(_folder(row, model, cfg), _begun_with(words, model, cfg))
    for row, words in {BEFORE: None, **rows}.items():
        for model in models:
            found.append(_measured(row, words, model, cfg, found))
            text = write(out, found, [BEFORE, *rows], _caption(models, cfg))
    if into is not None:
        from memtrain.report.table import marks_of, put_between_marks

        with written_aside(into) as aside:
            whole = put_between_marks(into.read_text(encoding="utf-8"), text, *marks_of("repair"))
            aside.write_text(whole, encoding="utf-8")
    print(f"{text}\n\n{out}: table.md, results.csv")


class _Model:
    """A run's model, the canaries of it that are to be forgotten, and what it is judged by: lists in `folder`."""

    def __init__(self, run: Path, name: str, cfg: DictConfig):
        for file in ("config.yaml", "summary.json", "copies.csv", "canaries.csv", "export"):
            if not (run / file).exists():
                raise ValueError(f"{run} has no {file}; name finished runs that draw their canaries (callbacks.copies)")
        self.name, self.run = name, trained_as(run)
        self.folder = Path(cfg.out).expanduser() / "models" / self.name
        self.shards = cfg.shards or self.run.shards
        self.passes = _A_ROW * json.loads((run / "summary.json").read_text(encoding="utf-8"))["samples_seen"]
        copied = _copied(run / "copies.csv")
        if len(copied) <= cfg.forget:
            raise ValueError(f"{run}: {len(copied)} canaries are copied; forget={cfg.forget} leaves none untouched")
        with (run / "canaries.csv").open(newline="", encoding="utf-8") as stream:
            never = [row for row in csv.DictReader(stream) if row["group"] == "reference"][: cfg.reference]
        forgotten, untouched = copied[: cfg.forget], copied[cfg.forget :]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.forgotten = forgotten
        self._list("forget", [(*row, "forgotten") for row in forgotten])
        reference = [(row["key"], row["caption"], "reference") for row in never]
        self.mark = reference[-12:]  # of the repair itself; not among those that are attacked
        self._list("reference", self.mark)
        self._list("attacked", [*((*row, "forgotten") for row in forgotten), *reference[: cfg.attacked]])
        self._list("plain", [*((*row, "untouched") for row in untouched), *reference])

    def _list(self, name: str, rows: Sequence[tuple]) -> None:
        with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("key", "caption", "group"), *rows])


def _copied(copies: Path) -> list[tuple[str, str]]:
    """Key and caption of each canary of which at least half of the generations are copies, of a run's copies.csv."""
    from memtrain.data.copies_file import read_copies

    canaries: dict[int, list] = {}
    for row in read_copies(copies):
        if row.group == "canary" and row.canary is not None:
            canaries.setdefault(row.canary, []).append(row)
    return [(of[0].key, of[0].caption) for of in canaries.values() if sum(row.is_copy for row in of) >= len(of) / 2]


def _folder(row: str, model: _Model, cfg: DictConfig) -> Path:
    return Path(cfg.out).expanduser() / "runs" / f"{row}_{model.name}"


def _repaired(folder: Path) -> Path:
    """What says that a repair is done, and how."""
    return folder / "model" / FOLDER / WRITTEN


def _begun_with(words: Sequence[str], model: _Model, cfg: DictConfig) -> dict:
    """All that decides a repair."""
    lists = {"forget": model.forgotten, "reference": model.mark}
    return {
        "model": model.run.model,
        "keep": str(model.shards),
        "words": [*cfg.drawing, *words],
        **{name: [list(row) for row in rows] for name, rows in lists.items()},
    }


def _check_record(folder: Path, begun_with: dict) -> None:
    """Raises ValueError where a repair that is there already was begun with other words or lists."""
    if not _repaired(folder).is_file():
        return
    record = folder / _RECORD
    was = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    other = [name for name, value in begun_with.items() if was.get(name) != value]
    if other:
        raise ValueError(
            f"{folder} was begun with another {' and '.join(other)}; delete that folder, or begin a new table with "
            "out=FOLDER"
        )


def _measured(
    row: str, words: Sequence[str] | None, model: _Model, cfg: DictConfig, found: Sequence[RepairFigures]
) -> RepairFigures:
    """Repair a model, unless that was done already, and evaluate it; words None: the model as it is."""
    folder = _folder(row, model, cfg)
    repaired, source = None, model.run.model
    if words is not None:
        repaired, source = _repaired(folder), [f"model={folder / 'model'}"]
        if not repaired.is_file():
            log.info("repairing %s: %s", model.name, row)
            folder.mkdir(parents=True, exist_ok=True)
            with written_aside(folder / _RECORD) as aside:
                aside.write_text(json.dumps(_begun_with(words, model, cfg), indent=2), encoding="utf-8")
            _run(repair, "repair", [
                *model.run.model, *model.run.told, f"forget={model.folder}/forget.csv", f"keep={model.shards}",
                f"reference={model.folder}/reference.csv", f"out={folder}/model", "force=true", *cfg.drawing, *words,
            ])  # fmt: skip
    parts = {"attacked": list(cfg.under_attack), "plain": ["attack=none"]}
    for name, attack in parts.items():
        log.info("evaluating %s: %s, %s", model.name, row, name)
        _run(evaluate, "evaluate", [
            *source, *model.run.told, f"data={model.shards}", f"samples={model.folder}/{name}.csv",
            f"out={folder}/{name}", *cfg.evaluate, *cfg.drawing, *attack,
        ])  # fmt: skip
    before = next((one for one in found if (one.row, one.model) == (BEFORE, model.name)), None)
    paths = (folder / name for name in parts)
    return read_figures(row, model.name, *paths, repaired, before, model.passes)


def _run(task, command: str, words: Sequence[str]) -> None:
    with contextlib.suppress(SystemExit):  # a repair that did not reach its mark is measured, too
        task(compose(command, spelled(command, list(words))))


def _caption(models: Sequence[_Model], cfg: DictConfig) -> str:
    first = _folder(BEFORE, models[0], cfg) / "attacked" / "evaluation.json"
    attack = json.loads(first.read_text(encoding="utf-8"))[0]["attack"]
    return (
        f"{made_by()} Figures are means ± standard deviations over models. Under attack: generations after {attack}. "
        "Held-out loss: of never-trained pictures, against the same model before. Drift: RMSE of latents of watched "
        "captions' pictures, before to after, which share words with forgotten ones and were not trained on. "
        f"Cost: forward passes of the repair's steps, a backward counting two, as a share of the training's "
        f"{models[0].passes} without its scores."
    )
