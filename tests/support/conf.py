"""Files of conf/, and the sections in them that a class takes."""

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from memtrain.cli.main import config_folder
from memtrain.cli.schema import TAKEN_BY

CONF = config_folder()
FILES = sorted([*CONF.glob("*.yaml"), *CONF.glob("*/*.yaml")])


def ours(target: str) -> bool:
    return target.startswith("memtrain.")


def sections() -> list[tuple[str, str, dict[str, Any]]]:
    """Where it stands, what takes it, and its keys with their values, unresolved."""
    return [found for file in FILES for found in _within(file.relative_to(CONF).stem, load(file))]


def load(file) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(file))


def _within(name: str, config: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    target = config.get("_target_", TAKEN_BY.get(name))
    if target:
        yield name, target, {key: value for key, value in config.items() if key not in ("_target_", "defaults")}
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _within(f"{name}.{key}", value)
