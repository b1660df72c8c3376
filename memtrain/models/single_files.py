"""Models as one .safetensors file, in the layout that their authors trained them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    CHECKPOINT_KEY_NAMES,
    LDM_VAE_KEYS,
    fetch_diffusers_config,
    infer_diffusers_model_type,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from torch import Tensor

from memtrain.models.families import FAMILIES
from memtrain.models.folders import Kind, check_family, check_file, is_folder

# what diffusers makes of a file's tensors -> the pipeline that they are of
PIPELINES = {
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    **dict.fromkeys(("sd3", "sd35_medium", "sd35_large"), "StableDiffusion3Pipeline"),
    **dict.fromkeys(("flux-dev", "flux-schnell"), "FluxPipeline"),
}
REMEDY = "say model.config=FOLDER, a diffusers folder of its family, with configs, tokenizers and what the file lacks"


def load_single_file(
    source: str, kind: Kind, dtype: torch.dtype, *, key: str, config: str | None = None
) -> DiffusionPipeline:
    """A pipeline on the CPU, without safety checker.

    A file holds weights, and often not all: no config, no tokenizer, of a Flux mostly the transformer alone. The rest
    comes from `config`, which is that of the hub's model of that kind where none is named.

    Args:
        source: a .safetensors file.
        kind: the pipelines that will do.
        key: what the user called `source`; for errors.
        config: a diffusers folder (read offline) or hub id of the file's family; its weights are read where the file
            has none.

    Raises:
        ValueError: in one line, what is wrong with the file, or what it lacks.
    """
    said, shapes = f"{key}={source}", check_file(key, source, kind)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    name = _told_by(tensors, said, kind)
    if name is None and config is None:
        raise ValueError(f"{said}: its tensors do not tell what it is; {REMEDY}")
    config = config or fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
    where, local = (str(Path(config).expanduser()), True) if is_folder(config) else (config, False)
    try:
        index = DiffusionPipeline.load_config(where, local_files_only=local)
    except Exception as error:  # whatever the hub or a damaged folder raise
        raise ValueError(f"{said} holds weights alone, and configs of {where} could not be had; {REMEDY}") from error
    try:
        described = index["_class_name"]
        if name not in (None, described):
            raise ValueError(f"it is a {name}, and {config} is of a {described}")
        options = dict(dtype=dtype, local_files_only=local)
        pipeline = getattr(diffusers, described).from_single_file(
            str(Path(source).expanduser()),
            config=where,
            **options,
            **FAMILIES[described].left_out,
            **_not_in(tensors, index, where, options),
        )
        for part, module in pipeline.components.items():
            if isinstance(module, torch.nn.Module) and any(weight.is_meta for weight in module.parameters()):
                raise ValueError(f"it lacks weights of its {part}")
    except Exception as error:  # whatever diffusers, the hub or a damaged file raise; all end in one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{said} cannot be loaded: {reason}; {REMEDY}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _told_by(tensors: dict[str, Tensor], said: str, kind: Kind) -> str | None:
    """The class name of the pipeline that a file's tensors are of; None where they do not tell.

    Raises:
        ValueError: they are of none that will do.
    """
    found = infer_diffusers_model_type(tensors)
    if found == "v1":  # what diffusers says of all that it does not know, too
        name = "StableDiffusionPipeline" if CHECKPOINT_KEY_NAMES["v1"] in tensors else None
    else:
        name = PIPELINES.get(found)
        if name is None:
            raise ValueError(f"{said} is a model of the kind {found}; {kind.remedy}")
    if name is not None:
        check_family(said, name, kind)
    return name


def _not_in(tensors: dict[str, Tensor], index: dict[str, Any], where: str, options: dict[str, Any]) -> dict[str, Any]:
    """VAE and text encoders that a file lacks, of the folder or hub id that describes it; None for optional parts of
    which there are no weights there either.

    Args:
        index: what is in its model_index.json.
        options: of their `from_pretrained`.
    """
    family = FAMILIES[index["_class_name"]]
    given: dict[str, Any] = {}
    for part, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None or not (part == "vae" or part.startswith("text_encoder")):
            continue
        kind = getattr(diffusers if entry[0] == "diffusers" else transformers, entry[1])
        if part == "vae":
            is_there = any(name.startswith(tuple(LDM_VAE_KEYS)) for name in tensors)
        else:
            is_there = is_clip_model_in_single_file(kind, tensors) or (
                kind is transformers.T5EncoderModel and is_t5_in_single_file(tensors)
            )
        if is_there:
            continue
        if part in family.optional and is_folder(where) and not any(Path(where, part).glob("*.safetensors")):
            given |= dict.fromkeys(family.optional)
        else:
            given[part] = kind.from_pretrained(where, subfolder=part, **options)
    return given
