"""`distributor=`, `workers=`, `part=` and `merge`: who does the tasks of a command, and which of them."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence

from omegaconf import DictConfig

from memtrain.cli.listing import LISTED
from memtrain.data.distribute import Distributor, Local, Part

DISTRIBUTORS = ("local", "ray")


def distributor_of(name: str, workers: int | None, address: str, otherwise: int) -> Distributor:
    """What `distributor=NAME` is.

    Args:
        workers: at a time; None: `otherwise` of this machine, or all that a cluster has room for.
        address: of the cluster.

    Raises:
        ValueError: there is none of that name, or it is not installed.
    """
    if name == "local":
        return Local(otherwise if workers is None else workers)
    if name != "ray":
        raise ValueError(f"distributor must be one of {', '.join(DISTRIBUTORS)}, got {name}")
    if importlib.util.find_spec("ray") is None:
        raise ValueError("distributor=ray needs an extra: pip install 'memtrain[ray]'")
    from memtrain.data.on_ray import OnRay

    return OnRay(address, workers)


def distributor_in(cfg: DictConfig, otherwise: int) -> Distributor:
    """That of a config with the keys `distributor`, `workers` and `ray.address`."""
    return distributor_of(cfg.distributor, cfg.workers, cfg.ray.address, otherwise)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_distributor(parser: argparse.ArgumentParser, otherwise: int) -> None:
    """Options of a command that goes over shards; `taken_from` reads them. `otherwise`: local workers if not said."""
    parser.add_argument("--distributor", default="local", metavar="NAME", help="local processes, or a ray cluster")
    parser.add_argument("--workers", type=int, metavar="N", help=f"at a time (local: {otherwise}; ray: one a core)")
    parser.add_argument("--ray.address", default="auto", dest="ray_address", metavar="HOST:PORT", help="(%(default)s)")
    parser.set_defaults(otherwise=otherwise)


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Options of a command that may be done in parts."""
    parser.add_argument("--part", default="1/1", metavar="N/M", help="only the N-th of M parts, such as 3/64")
    parser.add_argument("--merge", action="store_true", help="join what all parts have done")


def taken_from(options: dict) -> Distributor:
    """The distributor that options say, which are taken out of them."""
    return distributor_of(*(options.pop(name) for name in ("distributor", "workers", "ray_address", "otherwise")))


def part_from(options: dict) -> Part:
    """The part that options say, which is taken out of them."""
    return Part.parse(options.pop("part"))


def listed(left: Sequence[tuple[str, str]]) -> str:
    """The first of the tasks that were left, each with its reason, on one line."""
    said = ", ".join(f"{name} ({why})" for name, why in left[:LISTED])
    return f"{said}, … and {len(left) - LISTED} more" if len(left) > LISTED else said
