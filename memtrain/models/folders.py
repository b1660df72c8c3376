"""Folders and files that a config names as models. Imports nothing slow: a wrong one is said before torch is loaded."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from memtrain.models.families import FAMILIES


@dataclass(frozen=True)
class Kind:
    """Class names of the pipelines that will do, and what a config takes in words."""

    families: Collection[str]
    remedy: str


AUDITED = Kind(
    list(FAMILIES),
    "model takes a Stable Diffusion 1.x, 2.x, XL, 3, 3.5, Flux.1 or Flux.2 Klein folder, hub id or .safetensors file",
)
ANY = "auto"  # model=auto: of whatever family the folder or hub id is
LORA = "name a run's export/ that an adapter made, or a .safetensors file in diffusers' or kohya-ss' form"
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it
KOHYA_FILE = "kohya/lora.safetensors"  # in a folder of its own: diffusers would not know which of two to take
FILE = ".safetensors"
CONFIG = "model.config takes a diffusers folder or a hub id of the file's family"
CLIP = "name a CLIP folder or hub id, or leave it out"


def trained(family: str) -> Kind:
    """The pipelines of `model=FAMILY`. Raises ValueError where there is no such family."""
    chosen = [name for name in FAMILIES if family in (ANY, FAMILIES[name].choice)]
    if not chosen:
        known = ", ".join(one.choice for one in FAMILIES.values())
        raise ValueError(f"model.family must be one of {ANY}, {known}, got {family}")
    what = f"a diffusers folder, a hub id or a {FILE} file"
    return Kind(chosen, f"model.pretrained takes {what}, of a {' or '.join(chosen)}")


def check_family(said: str, name: str, kind: Kind) -> None:
    """Raises ValueError where a pipeline's class name is of no family that will do. `said`: what is of that class."""
    if name in kind.families:
        return
    remedy = f"say model={FAMILIES[name].choice}" if name in FAMILIES else kind.remedy
    raise ValueError(f"{said} is a {name}; {remedy}")


def is_folder(source: str) -> bool:
    """Whether this is meant as a path, there or not, and no hub id."""
    return Path(source).expanduser().exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1


def check_folder(key: str, source: str, remedy: str) -> None:
    """Raises ValueError where `source` is meant as a path, and is no folder."""
    if is_folder(source) and not Path(source).expanduser().is_dir():
        raise ValueError(f"{key}={source}: no such folder; {remedy}")


def is_file(source: str) -> bool:
    """Whether this is meant as one file with a model's weights."""
    return Path(source).suffix in (FILE, ".ckpt", ".pt", ".bin") or Path(source).expanduser().is_file()


def check_pipeline(key: str, source: str, kind: Kind, config: str | None = None) -> None:
    """Raises ValueError where `source` is meant as a path, and is no folder or file with a pipeline of this kind.

    Args:
        config: what describes a file.
    """
    if is_file(source):
        check_file(key, source, kind)
        if config is not None:
            check_folder("model.config", config, CONFIG)
            check_pipeline("model.config", config, Kind(kind.families, CONFIG))
        return
    if config is not None:
        raise ValueError(f"model.config={config} describes a {FILE} file, and {key}={source} is none; leave it out")
    check_folder(key, source, kind.remedy)
    if not is_folder(source):
        return
    folder, said = Path(source).expanduser(), f"{key}={source}"
    index = folder / "model_index.json"
    if not index.is_file() and (folder / LORA_FILE).is_file():
        raise ValueError(f"{said} is an adapter, not a pipeline; name its base there, and say lora={source}")
    if not index.is_file():
        raise ValueError(f"{said} is not a pipeline: it has no model_index.json; {kind.remedy}")
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{said}: model_index.json names no pipeline; {kind.remedy}") from None
    check_family(said, name, kind)
    for part in FAMILIES[name].parts:
        if not (folder / part).is_dir():
            raise ValueError(f"{said} has no {part}/; {kind.remedy}")


def check_file(key: str, source: str, kind: Kind) -> dict[str, list[int]]:
    """The shapes of a file's tensors, by name. Raises ValueError where it is none, or holds an adapter."""
    path, said = Path(source).expanduser(), f"{key}={source}"
    if not path.is_file():
        raise ValueError(f"{said}: no such file; {kind.remedy}")
    if path.suffix != FILE:
        raise ValueError(f"{said} is no {FILE} file, and others may run code when they are read; convert it")
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError
            header = json.loads(file.read(size))
            shapes = {name: list(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{said} cannot be read as {FILE}; fetch it again") from None
    if shapes and all("lora" in name or name.endswith((".alpha", "dora_scale")) for name in shapes):
        raise ValueError(f"{said} is an adapter, not a model; name its base there, and say lora={source}")
    return shapes


def check_lora(key: str, source: str) -> Path:
    """The file of an adapter. Raises ValueError where `source` is neither a folder with one nor such a file."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / name for name in (LORA_FILE, KOHYA_FILE) if (path / name).is_file()]
        if not found:
            raise ValueError(f"{key}={source} has no {LORA_FILE} in it; {LORA}")
        return found[0]
    if not path.is_file():
        raise ValueError(f"{key}={source}: no such file or folder; {LORA}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{key}={source} is no .safetensors file; {LORA}")
    return path
