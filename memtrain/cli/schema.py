"""Types of every config key: a misspelt or mistyped one stops at once, with its name.

Keys and their values are in conf/, and nowhere else. A file there asks for the types of its own keys with
`/schema/NAME@_here_` in its defaults list. In a section that names a class (`_target_`) a key has the type of the
class's parameter; any other has that of its value, or is text where that is null or missing. What neither shows
is said here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from memtrain.cli.signatures import is_ours, parameters
from memtrain.data.paths import config_folder
from memtrain.sweep.space import Parameter


def _varied() -> type:
    """Keys of one setting that a study varies: what `Parameter` takes, but its name, which is the key it stands at."""
    types = parameters(f"{Parameter.__module__}.{Parameter.__name__}")
    own = {field.name: field.default for field in dataclasses.fields(Parameter) if field.name != "name"}
    given = {name: MISSING if default is dataclasses.MISSING else default for name, default in own.items()}
    return dataclasses.make_dataclass("Varied", [(name, types[name], value) for name, value in given.items()])


# sections that a class takes, though they name none
TAKEN_BY = {
    "train.loss": "memtrain.training.objective.Objective",
    "train.stop_early": "memtrain.training.stop_early.StopEarly",
    "study.prune": "memtrain.sweep.pruning.MedianRule",
}
OPTIONAL = {"study.prune"}  # sections that may be null, beside those that name a class
_AUDIT = ("detect", "explain", "mitigate", "repair", "evaluate")
TYPES = {
    "train.resume.allow": Any,  # "all", or a list of keys
    "train.canaries.count": int | None,
    "train.canaries.repeats": Any,  # a number, a list of them, or null
    "train.reference.batch_size": int | None,
    "demo.repeated": int | None,
    "trainer.devices": Any,  # a number, -1 for all, a list of numbers, or auto
    "trainer.num_nodes": int,
    "trainer.gradient_clip_val": float | None,
    **{f"{command}.guidance_scale": float | None for command in _AUDIT},
    **{f"{command}.nearest": int | None for command in ("mitigate", "evaluate")},
    **{f"{command}.workers": int | None for command in ("detect", "evaluate")},
    "cache.processes": int | None,
    "detect.max_fpr": Any,  # a share, or a list of them
    "detect.threshold": float | None,
    "detect.shared_noise": int | None,
    **{f"{command}.{key}": int | None for command in _AUDIT for key in ("max_sequence_length", "resolution")},
    "mitigate.method": Any,  # names: one, a list or all; and each method's settings
    "mitigate.target": Any,  # a score, or q0.1
    "repair.method": Any,  # names: one; and each method's settings
    "repair.earlier": Any,  # one, or a list
    "repair.lr": float | None,
    "repair.data.shards": Any,  # as data.shards of train
    "repair.keep.shards": Any,
    "repair.target_modules": Any,  # a name, or a list
    "bench_repair.runs": Any,  # one, or a list
    "bench_repair.rows": dict[str, list[str]],
    "bench_repair.only": list[str] | None,
    "evaluate.models": Any,  # one, or a list
    "evaluate.lora": Any,  # one for all models, or a list with one or null for each
    "evaluate.data.shards": Any,  # as data.shards of train
    "sweep.patience": float | None,
    "bench_mitigation.seeds": int | None,
    "bench_mitigation.workers": Any,  # a number, or auto
    **{
        f"protocol.{name}.rows": dict[str, list[str]]
        for name in ("demo", "demo_lora", "imagenette", "laion10k", "wen2024")
    },
    "study.space": dict[str, _varied()],
}
_ASKS = re.compile(r"/schema/(\S+)@_here_")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # Hydra reads the files anew, ten times as slowly


@cache
def register() -> None:
    """Make the types known to Hydra, each under the name that a file of conf/ asks for."""
    store = ConfigStore.instance().store
    for file in (*config_folder().glob("*.yaml"), *config_folder().glob("*/*.yaml")):
        text = file.read_text(encoding="utf-8")
        if asked := _ASKS.search(text):
            group, _, name = f"schema/{asked[1]}".rpartition("/")
            store(group=group, name=name, node=node(asked[1].replace("/", "."), yaml.load(text, LOADER)))


def node(name: str, section: Mapping[str, Any]) -> type:
    """A dataclass of the keys of a file, or of a section of one, without their values.

    Raises:
        LookupError: the class that takes the section does not take one of its keys.
    """
    return dataclasses.make_dataclass(name.replace(".", "_"), _fields(name, section))


def _fields(name: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    target = section.get("_target_", TAKEN_BY.get(name, ""))
    taken = {"_target_": str} | parameters(target) if is_ours(target) else None
    for key, value in section.items():
        if key in ("defaults", "hydra"):
            continue
        if taken is not None and key not in taken:
            raise LookupError(f"{name}.{key}: {target} has no such parameter; it has {', '.join(taken)}")
        path = f"{name}.{key}"
        if path not in TYPES and isinstance(value, Mapping):
            inner = node(path, value)
            kind = inner | None if "_target_" in value or path in OPTIONAL else inner
            yield key, kind, dataclasses.field(default_factory=inner)
        else:
            kind = TYPES.get(path) or (_shown_by(value) if taken is None else taken[key])
            yield key, kind, dataclasses.field(default=MISSING)
    for group in groups(section):
        yield group, Any, dataclasses.field(default=MISSING)  # typed by the file that is chosen


def groups(config: Mapping[str, Any], with_optional: bool = False) -> list[str]:
    """Those of which a command's config chooses a file each; of optional ones, such as `experiment`, none."""
    chosen = [entry for entry in config.get("defaults", ()) if isinstance(entry, dict)]
    pairs = [pair for entry in chosen for pair in entry.items() if not pair[0].startswith("override ")]
    return [group for group, choice in pairs if with_optional or choice is not None]


def _shown_by(value: Any) -> Any:
    """The type of a key with this value."""
    if value is None:
        return str | None
    if isinstance(value, list):
        return list[type(value[0]) if value else str]
    return type(value)
