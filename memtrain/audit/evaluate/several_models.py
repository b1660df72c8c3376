"""Several finished models against one another: copies, alignment, quality; results kept a model.

See `memtrain.audit.evaluate.one_model` for what is measured.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import AsTrained, Denoiser
from memtrain.audit.evaluate.judging import GroupResult
from memtrain.audit.evaluate.looks import Advance, Looker
from memtrain.audit.evaluate.one_model import Evaluation, Lookers
from memtrain.audit.evaluate.results import Found, Match, ModelResult
from memtrain.audit.evaluate.settings import Measures, Settings
from memtrain.audit.training_samples import TrainingSamples
from memtrain.core.files import written_aside
from memtrain.data.distribute import Distributor, Local, Part
from memtrain.data.samples import ShardSamples
from memtrain.models.folders import is_file

log = logging.getLogger(__name__)

DrawGallery = Callable[[Path, str, str, Sequence[Match]], None]  # to a file: heading, what a copy is, pairs
VERSION = 3  # of results: raise it where the same settings give other figures


def evaluate(
    models: Sequence[str],
    samples: ShardSamples,
    chosen: TrainingSamples,
    measures: Measures,
    settings: Settings,
    out: Path,
    *,
    batch_size: int,
    device: str | None,
    dtype: str,
    draw: DrawGallery,
    loras: Sequence[str | None] | None = None,
    as_trained: AsTrained | None = None,
    config: str | None = None,
    advance: Advance = lambda what, done, total: None,
    spread: ModelsSpread | None = None,
) -> list[ModelResult]:
    """One result a model, in the order given; each is written to `out`/NAME once it is whole, and kept.

    A model that was evaluated before with the same weights, samples and settings is not evaluated again.

    Args:
        config: of models that are files; see `memtrain.models.single_files.load_single_file`.
        loras: for each model a folder or file with an adapter to load into it, or None; None: none has one.
        as_trained: how they were trained, where their files do not say it.
        spread: who evaluates, and which models; None: this process, and all. Of a part the results of its models.

    Raises:
        ValueError: a model cannot be loaded, or is named twice; or one is missing to merge.
        OSError: a part of a model could not be evaluated, however often that was tried.
    """
    results, spread = [], spread or ModelsSpread()
    loras = loras or [None] * len(models)
    named = list(zip(models, loras, names_of(models, loras), strict=True))
    for source, lora, name in [named[place] for place in spread.part.of(len(named))]:
        of_file = config if is_file(source) else None
        denoiser = Denoiser.load(source, device, dtype, lora=lora, config=of_file, as_trained=as_trained)
        if measures.margin is not None:
            measures.margin.check(denoiser)
        own = replace(settings, guidance_scale=denoiser.guided(settings.guidance_scale).guidance_scale)
        identity = _identity(denoiser, samples, chosen, measures, own)
        result = _read_result(out / name, identity)
        if result is None:
            if spread.merge:
                raise ValueError(
                    f"merge: {name} is not evaluated yet by {out}; do the other parts first, or leave merge out to do "
                    "it here"
                )
            tell = partial(_of_model, advance, name)
            looker = Looker(denoiser, samples, chosen, measures, own, ShrinkingBatches(batch_size), tell)
            load = None
            if spread.load is not None:
                load = partial(load_looker, spread.load, source, lora, chosen, own, batch_size)
            evaluation = Evaluation(looker, Lookers(spread.distributor, load), batch_size, tell)
            found = evaluation.run(name, source, identity)
            _write_found(out / name, found, draw)
            result = found.result
            del evaluation, looker
        else:
            log.info("%s: kept what was found with the same settings in %s", name, out / name)
        results.append(replace(result, source=source, lora=lora))
        del denoiser  # the next model needs its memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


Load = Callable[[str, str | None], tuple[Denoiser, ShardSamples, Measures]]  # by a model and its adapter


@dataclass(frozen=True)
class ModelsSpread:
    """Who evaluates, and which of the models.

    Args:
        distributor: who; models one after the other, each shared by all workers.
        load: what gives another process a model, the samples and the measures; a function of a module; None: it is
            this process.
        part: these models alone.
        merge: none; all have been evaluated.
    """

    distributor: Distributor = field(default_factory=Local)
    load: Load | None = None
    part: Part = field(default_factory=Part)
    merge: bool = False


def load_looker(
    load: Load, source: str, lora: str | None, chosen: TrainingSamples, settings: Settings, batch_size: int
) -> Looker:
    """That of another process."""
    denoiser, samples, measures = load(source, lora)
    return Looker(denoiser, samples, chosen, measures, settings, ShrinkingBatches(batch_size))


def _of_model(advance: Advance, name: str, what: str, done: int, total: int) -> None:
    advance(f"{name}: {what}", done, total)


def read_rows(out: Path, results: Sequence[ModelResult]) -> pa.Table:
    """A row a generation, of all models."""
    tables = []
    for result in results:
        table = pq.read_table(out / result.model / "rows.parquet")
        tables.append(table.add_column(0, "model", pa.array([result.model] * len(table), pa.string())))
    return pa.concat_tables(tables)


def names_of(models: Sequence[str], loras: Sequence[str | None]) -> list[str]:
    """A name for each model, fit for a folder's: that of its adapter, where it has one and that tells it from the
    others; of the model, where that does; else of both.

    Raises:
        ValueError: a model is named twice, with the same adapter.
    """
    told = [lora or model for model, lora in zip(models, loras, strict=True)]
    for paths in (told, models):
        if len(set(paths)) == len(paths):
            return short_names(paths)
    both = [f"{model}_{lora}" for model, lora in zip(_short(models), _short(told), strict=True)]
    return both if len(set(both)) == len(both) else short_names(told)  # which says what is named twice


def _short(paths: Sequence[str]) -> list[str]:
    """`short_names` of paths that may be named several times."""
    each = sorted({*paths})
    names = dict(zip(each, short_names(each), strict=True))
    return [names[path] for path in paths]


def short_names(models: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell models apart, without `export`, fit for a folder's name.

    Raises:
        ValueError: one is named twice.
    """
    parts = []
    for model in models:
        path = Path(model).expanduser()
        names = [part for part in (path.resolve() if path.exists() else path).parts if part != "/"]
        parts.append(names[:-1] if len(names) > 1 and names[-1] == "export" else names)
    for place, model in enumerate(models):
        if parts[place] in parts[:place]:
            raise ValueError(f"models names {model} twice; name each model once")
    for depth in range(1, max(map(len, parts)) + 1):
        names = [re.sub(r"[^\w.-]+", "_", "_".join(part[-depth:])).lstrip(".") or "model" for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}_{place}" for place, name in enumerate(names)]  # they differ in what no folder's name may hold


# ---- results on disk


def _write_found(folder: Path, found: Found, draw: DrawGallery) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # from here on the others may be of another make
    with written_aside(folder / "rows.parquet", shared=True) as aside:
        pq.write_table(found.rows, aside, compression="zstd")
    name, rule = found.result.model, found.result.copy_rule
    heading = f"{name}: generations nearest to their training image"
    with written_aside(folder / "gallery.html", shared=True) as aside:
        draw(aside, heading, rule, found.pairs)
    with written_aside(folder / "result.json", shared=True) as aside:  # last: it vouches for the others
        aside.write_text(json.dumps(asdict(found.result), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _identity(
    denoiser: Denoiser, samples: ShardSamples, chosen: TrainingSamples, measures: Measures, settings: Settings
) -> str:
    """A hash of all that decides a result."""
    digest = hashlib.sha256(denoiser.fingerprint().encode())
    digest.update(denoiser.model.fingerprint("vae")["vae"].encode())
    shards = [(shard.name, index.size) for shard, index in zip(samples.shards, samples.indexed.indexes, strict=True)]
    alignment = None if measures.alignment is None else measures.alignment.identity()
    similarity = (measures.similarity.identity(), measures.similarity.bound)
    attack = type(settings.attack)  # one's own may have the fields of another
    said = [VERSION, asdict(settings), f"{attack.__module__}.{attack.__qualname__}", asdict(chosen), shards]
    said += [samples.where, similarity]
    margin = [] if measures.margin is None else [measures.margin.identity()]
    digest.update(json.dumps([*said, alignment, measures.features.identity(), *margin]).encode())
    return digest.hexdigest()


def _read_result(folder: Path, identity: str) -> ModelResult | None:
    """What an earlier call found, where it was made alike."""
    try:
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if found["identity"] != identity or not (folder / "rows.parquet").is_file():
            return None
        return ModelResult(**{**found, "groups": [GroupResult(**group) for group in found["groups"]]})
    except (OSError, ValueError, KeyError, TypeError):  # none, or half of one: found anew
        return None
