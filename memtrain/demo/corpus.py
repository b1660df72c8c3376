"""What a demo corpus on disk is: its recipe, and whether a folder holds it. Imports nothing that takes long."""

from __future__ import annotations

import json
from pathlib import Path

SHARD_ROWS_IN_KEY = 10_000  # img2dataset: key = shard id × 10⁴ + row


def recipe_of(num_samples: int, seed: int, shard_size: int, repeated: int, copies: int) -> dict[str, int]:
    """The numbers that make a corpus what it is. Raises ValueError where one is out of range."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if not 1 <= shard_size <= SHARD_ROWS_IN_KEY:
        raise ValueError(f"shard_size must be from 1 to {SHARD_ROWS_IN_KEY}, got {shard_size}")
    if repeated < 0 or copies < 1 or repeated * copies > num_samples:
        raise ValueError(
            f"repeated must be >= 0, copies >= 1 and repeated x copies at most num_samples={num_samples}, "
            f"got {repeated} and {copies}"
        )
    return {
        "num_samples": num_samples,
        "seed": seed,
        "shard_size": shard_size,
        "repeated": repeated,
        "copies": copies,
    }


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
    if found != recipe:
        raise ValueError(
            f"{folder} holds something other than the demo corpus of {recipe}; delete it or choose another folder"
        )
    suffixes = (".tar", ".parquet", "_stats.json")
    expected = {f"{shard:05d}{suffix}" for shard in range(shard_count(recipe)) for suffix in suffixes}
    if expected - present:
        raise ValueError(f"{folder} has lost {min(expected - present)}; delete it or choose another folder")
    return True
