"""Folders that a config names as models. Imports nothing slow: a wrong one is said before torch is loaded."""

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


TRAINED = Kind(
    [name for name, family in FAMILIES.items() if family.is_trained],
    "model.pretrained takes a Stable Diffusion 1.x, 2.x, 3 or 3.5 diffusers folder or a hub id",
)
TRAINED_FLOWS = Kind(
    [name for name, family in FAMILIES.items() if family.is_trained and family.is_flow],
    "model.pretrained takes a Stable Diffusion 3 or 3.5 diffusers folder or a hub id; for others say "
    "model=stable_diffusion",
)
AUDITED = Kind(
    list(FAMILIES),
    "model takes a Stable Diffusion 1.x, 2.x, XL, 3 or 3.5 diffusers folder or a hub id",
)
LORA = "name a run's export/ that an adapter made, or a .safetensors file in diffusers' or kohya-ss' form"
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it
KOHYA_FILE = "kohya/lora.safetensors"  # in a folder of its own: diffusers would not know which of two to take
CLIP = "name a CLIP folder or hub id, or leave it out"


def is_folder(source: str) -> bool:
    """Whether this is meant as a path, there or not, and no hub id."""
    return Path(source).expanduser().exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1


def check_folder(key: str, source: str, remedy: str) -> None:
    """Raises ValueError where `source` is meant as a path, and is no folder."""
    if is_folder(source) and not Path(source).expanduser().is_dir():
        raise ValueError(f"{key}={source}: no such folder; {remedy}")


def check_pipeline(key: str, source: str, kind: Kind) -> None:
    """Raises ValueError where `source` is meant as a path, and is no folder with a pipeline of this kind."""
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
    if name not in kind.families:
        raise ValueError(f"{said} is a {name}; {kind.remedy}")
    for part in FAMILIES[name].parts:
        if not (folder / part).is_dir():
            raise ValueError(f"{said} has no {part}/; {kind.remedy}")


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
