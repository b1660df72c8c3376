"""Stock diffusers pipelines from a folder or the hub, and hashes of their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from memtrain.models.families import FAMILIES
from memtrain.models.folders import Kind, check_family, check_pipeline, is_file, is_folder
from memtrain.models.single_files import load_single_file

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # a bar a file says nothing here


def load_pipeline(
    source: str, kind: Kind, dtype: torch.dtype, *, key: str, config: str | None = None
) -> DiffusionPipeline:
    """A pipeline on the CPU, without safety checker, offline where `source` is a folder.

    Args:
        source: a diffusers folder, a hub id or a .safetensors file.
        kind: the pipelines that will do.
        key: what the user called `source`; for errors.
        config: of a file; see `memtrain.models.single_files.load_single_file`.

    Raises:
        ValueError: `source` is neither, or a pipeline of another family.
    """
    check_pipeline(key, source, kind, config)
    if is_file(source):
        return load_single_file(source, kind, dtype, key=key, config=config)
    local = is_folder(source)
    where = str(Path(source).expanduser()) if local else source
    try:
        index = DiffusionPipeline.load_config(where, local_files_only=local)
        name = index["_class_name"]
    except Exception as error:  # whatever the hub, the cache or a damaged file raise; all end in one line
        raise _unloaded(key, source, kind, error) from error
    check_family(f"{key}={source}", name, kind)
    try:
        family = FAMILIES[name]
        lacking = {part: None for part in family.optional if not index.get(part, [None])[0]}
        options = dict(dtype=dtype, local_files_only=local, **family.left_out, **lacking)
        return getattr(diffusers, name).from_pretrained(where, **options)
    except Exception as error:  # the same
        raise _unloaded(key, source, kind, error) from error


def _unloaded(key: str, source: str, kind: Kind, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"{key}={source} cannot be loaded: {reason}; {kind.remedy}")


def hash_weights(module: nn.Module) -> str:
    """A hash of names, shapes and values in float32, so that it does not depend on the precision of the run."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().flatten().numpy())  # its bytes, not copied
    for name, layer in module.named_modules():
        if hasattr(layer, "active_adapters") and hasattr(layer, "scaling"):  # peft's: in what its weights do not show
            digest.update(f"{name} {layer.active_adapters} {layer.scaling} {layer.disable_adapters}".encode())
    return digest.hexdigest()
