"""`distributor=`, `workers=`, `part=` and `merge`: who does the tasks of a command, and which of them."""

from __future__ import annotations

import argparse
import os

from memtrain.data.distribute import Distributor, Local, Part

DISTRIBUTORS = ("local",)


def distributor_of(name: str, workers: int | None, otherwise: int) -> Distributor:
    """What `distributor=NAME` is.

    Args:
        workers: None: `otherwise` of this machine.
    """
    if name not in DISTRIBUTORS:
        raise ValueError(f"distributor must be one of {', '.join(DISTRIBUTORS)}, got {name}")
    return Local(otherwise if workers is None else workers)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_distributor(parser: argparse.ArgumentParser) -> None:
    """Options of a command that goes over shards; `taken_from` reads them."""
    parser.add_argument("--distributor", default="local", metavar="NAME", help=" or ".join(DISTRIBUTORS))
    parser.add_argument("--workers", type=int, metavar="N", help="processes at a time (as many as there are cores)")


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Options of a command that may be done in parts."""
    parser.add_argument("--part", default="1/1", metavar="N/M", help="only the N-th of M parts, such as 3/64")
    parser.add_argument("--merge", action="store_true", help="join what all parts have done")


def taken_from(options: dict) -> Distributor:
    """The distributor that options say, which are taken out of them."""
    return distributor_of(options.pop("distributor"), options.pop("workers"), cores())


def part_from(options: dict) -> Part:
    """The part that options say, which is taken out of them."""
    return Part.parse(options.pop("part"))
