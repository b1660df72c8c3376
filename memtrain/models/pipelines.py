"""Stock diffusers pipelines from a folder or the hub, and hashes of their weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import nn

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # a bar a file says nothing here


def load_pipeline(
    source: str, families: Mapping[str, type[DiffusionPipeline]], dtype: torch.dtype, *, key: str, remedy: str
) -> DiffusionPipeline:
    """A pipeline on the CPU, without safety checker, offline where `source` is a folder.

    Args:
        source: a diffusers folder or a hub id.
        families: class name -> class of the pipelines that will do.
        key, remedy: what the user called `source`, and what it takes; for errors.

    Raises:
        ValueError: `source` is neither, or a pipeline of another family.
    """
    folder = Path(source).expanduser()
    is_folder = folder.exists()
    if is_folder or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        _check_folder(folder, families, f"{key}={source}", remedy)
    where = str(folder) if is_folder else source
    try:
        name = DiffusionPipeline.load_config(where, local_files_only=is_folder)["_class_name"]
        if name not in families:
            raise ValueError(f"it is a {name}")
        options = dict(dtype=dtype, local_files_only=is_folder)
        if families[name] is StableDiffusionPipeline:
            options |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        return families[name].from_pretrained(where, **options)
    except Exception as error:  # whatever the hub, the cache or a damaged file raise; all end in one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{key}={source} cannot be loaded: {reason}; {remedy}") from error


def _check_folder(folder: Path, families: Mapping[str, type], said: str, remedy: str) -> None:
    if not folder.is_dir():
        raise ValueError(f"{said}: no such folder; {remedy}")
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{said} is not a pipeline: it has no model_index.json; {remedy}")
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{said}: model_index.json names no pipeline; {remedy}") from None
    if name not in families:
        raise ValueError(f"{said} is a {name}; {remedy}")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise ValueError(f"{said} has no {part}/; {remedy}")


def hash_weights(module: nn.Module) -> str:
    """Of names, shapes and values in float32, so that it does not depend on the precision of the run."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
