"""What a demo corpus on disk is: its recipe, and whether a folder holds it. Imports nothing that takes long."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

SHARD_ROWS_IN_KEY = 10_000  # img2dataset: key = shard id × 10⁴ + row
PICTURES = ("fluent", "noto")
KINDS = ("matching", "retrieval", "template", "near", "duplicates")  # of canaries, see canaries.py


def recipe_of(
    num_samples: int,
    seed: int = 0,
    shard_size: int = 1000,
    pictures: str = "fluent",
    doses: Mapping[str, Sequence[int]] | None = None,
) -> dict:
    """What makes a corpus what it is, as corpus.json holds it.

    Args:
        num_samples: of all shards together.
        seed: of all draws.
        shard_size: samples of a shard.
        pictures: `fluent` or `noto`.
        doses: of each kind, how often the corpus holds each of its canaries; all other pictures come once.

    Raises:
        ValueError: one of them is out of range.
    """
    given = {kind: list(doses[kind]) for kind in KINDS if (doses or {}).get(kind)}  # in one order, whatever it was
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if not 1 <= shard_size <= SHARD_ROWS_IN_KEY:
        raise ValueError(f"shard_size must be from 1 to {SHARD_ROWS_IN_KEY}, got {shard_size}")
    if pictures not in PICTURES:
        raise ValueError(f"pictures must be {' or '.join(PICTURES)}, got {pictures}")
    if unknown := (doses or {}).keys() - set(KINDS):
        raise ValueError(f"doses has no kind {min(unknown)}; it has {', '.join(KINDS)}")
    for kind, numbers in given.items():
        if min(numbers) < 1:
            raise ValueError(f"doses.{kind} must be at least 1, got {min(numbers)}")
    if (taken := sum(sum(numbers) for numbers in given.values())) > num_samples:
        raise ValueError(
            f"the canaries are {taken} samples, more than num_samples={num_samples}; raise that or give fewer doses"
        )
    return {"pictures": pictures, "num_samples": num_samples, "seed": seed, "shard_size": shard_size, "doses": given}


def duplicates(repeated: int, copies: int) -> dict[str, list[int]]:
    """Doses of `repeated` pictures that come `copies` times each, half of the time as near copies.

    Raises ValueError where a number is out of range.
    """
    if repeated < 0 or copies < 1:
        raise ValueError(f"repeated must be >= 0 and copies >= 1, got {repeated} and {copies}")
    return {"duplicates": [copies] * repeated}


def shard_count(recipe: dict) -> int:
    """How many shards a corpus has; the last one may be shorter."""
    return -(-recipe["num_samples"] // recipe["shard_size"])


def is_corpus(folder: Path, recipe: dict) -> bool:
    """Whether `folder` holds the complete corpus of `recipe`; False where it is empty or missing.

    Raises ValueError where it holds anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; choose another place for the demo corpus")
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not present:
        return False
    try:
        found = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        found = None
    if not isinstance(found, dict) or "num_samples" not in found:
        raise ValueError(f"{folder} holds something other than the demo corpus; delete it or choose another folder")
    if others := [key for key in recipe if found.get(key) != recipe[key]]:
        raise ValueError(
            f"{folder} holds a demo corpus of other {', '.join(others)}, such as an earlier version made; delete it or "
            "choose another folder"
        )
    suffixes = (".tar", ".parquet", "_stats.json")
    expected = {f"{shard:05d}{suffix}" for shard in range(shard_count(recipe)) for suffix in suffixes}
    if missing := (expected | {"canaries.csv"}) - present:
        raise ValueError(f"{folder} has lost {min(missing)}; delete it or choose another folder")
    return True
