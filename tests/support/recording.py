"""What runs left in their folders, as tensors, and which tensors of two recordings differ."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from safetensors import safe_open

# of columns and keys: times, and shares of time; ids that a process draws; folders of the machine; hashes of what
# settings are called
LEFT_OUT = re.compile(
    r"(^|[/._ -])(time|date|seconds\w*|duration|mtime_ns|pid|wandb_id|run_id|folder|ckpt_path|scoring_share|identity)$"
    r"|per_second"
)
NO_DATA = {".png", ".html", ".lock", ".log", ".yaml", ".tar", ".wandb", ".md", ".txt", ".js"}


def kept(folder: Path) -> dict[str, np.ndarray]:
    """Every number and text in the files of a folder, by file and column."""
    found: dict[str, np.ndarray] = {}
    tables = defaultdict(list)
    checkpoints = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.is_symlink() or path.suffix in NO_DATA or "wandb/" in name:
            continue
        if path.suffix == ".parquet":
            tables[Path(name).parent.as_posix() if "-0" in path.name else name].append(path)
        elif path.suffix == ".ckpt":
            checkpoints.append(path)
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                found |= {f"{name}/{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        elif path.suffix == ".npy":
            found[name] = _plain(np.load(path, allow_pickle=False))
        elif path.suffix == ".csv":
            found |= _columns(name, list(csv.DictReader(path.open(newline=""))))
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found |= _flat(name, [json.loads(line) for line in lines])
        else:
            raise ValueError(f"{path}: say what to do with files of this kind")
    for name, paths in tables.items():  # a ledger's parts: one table, whatever is in which part
        table = ds.dataset(paths).to_table()
        table = table.sort_by([(column, "ascending") for column in table.column_names if not _is_nested(table, column)])
        found |= {f"{name}/{column}": _column(table[column]) for column in table.column_names}
    if checkpoints:
        found |= _flat("checkpoint", torch.load(checkpoints[-1], weights_only=True, map_location="cpu"))
    return {name: array for name, array in found.items() if not LEFT_OUT.search(name)}


def _is_nested(table: pa.Table, column: str) -> bool:
    return pa.types.is_nested(table.schema.field(column).type)


def _columns(name: str, rows: list[dict]) -> dict[str, np.ndarray]:
    return {f"{name}/{column}": _text([row[column] for row in rows]) for column in (rows[0] if rows else ())}


def _column(values: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_floating(values.type):
        return values.to_numpy()  # null is NaN
    is_number = pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
    return values.to_numpy() if is_number and not values.null_count else _text(values.to_pylist())


def _flat(name: str, value) -> dict[str, np.ndarray]:
    """The leaves of nested containers: tensors as they are, all else as text."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return {name: value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy()}
    if isinstance(value, dict):
        return {leaf: array for key, part in value.items() for leaf, array in _flat(f"{name}/{key}", part).items()}
    if isinstance(value, list | tuple) and any(isinstance(part, dict | list | tuple | torch.Tensor) for part in value):
        return {leaf: array for i, part in enumerate(value) for leaf, array in _flat(f"{name}/{i}", part).items()}
    return {name: _text(value)}


def _text(value) -> np.ndarray:
    """UTF-8, a float in full; the folder that the recording lies in is not part of it."""
    return np.frombuffer(json.dumps(value, default=str).replace(os.getcwd(), ".").encode(), dtype=np.uint8)


def _plain(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), np.uint8) if array.dtype.fields or array.dtype.kind in "SUV" else array


def compare(a: Path, b: Path) -> int:
    differ = total = 0
    names = sorted({path.name for folder in (a, b) for path in folder.glob("*.safetensors")})
    if not names:
        raise SystemExit(f"error: neither {a} nor {b} holds a recording")
    for name in names:
        ours, theirs = (_load(folder / name) for folder in (a, b))
        total += len(ours)
        gone, new = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
        for one in sorted(gone):  # under another name?
            same = next((other for other in sorted(new) if _equal(ours[one], theirs[other])), None)
            if same is None:
                differ += 1
                print(f"{name}: {one} is not in {b}")
            else:
                new.remove(same)
                print(f"{name}: {one} is called {same} in {b}, equal")
        for one in sorted(new):
            print(f"{name}: {one} is new in {b}")
        for one in sorted(ours.keys() & theirs.keys()):
            if not _equal(ours[one], theirs[one]):
                differ += 1
                print(f"{name}: {one} differs{_how(ours[one], theirs[one])}")
    print(f"{differ} of {total} tensors differ" if differ else f"all {total} tensors are equal, bit for bit")
    return 1 if differ else 0


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys() if not LEFT_OUT.search(key)}  # noqa: SIM118


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _how(a: np.ndarray, b: np.ndarray) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f": {a.dtype} {a.shape}, {b.dtype} {b.shape}"
    if a.dtype == np.uint8:
        return ""
    largest = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
    return f" by up to {largest:.3g}" if math.isfinite(largest) else ""
