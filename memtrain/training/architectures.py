"""Models without weights, or with random ones, of a folder's configs, or of those of well-known models.

`architectures/` holds the configs of public models, as their own folders have them, but for keys at their defaults.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from memtrain.demo import PIPELINE
from memtrain.models.base import DiffusionModel
from memtrain.models.families import FAMILIES
from memtrain.models.folders import Kind, check_family, check_pipeline, is_folder

_KNOWN = Path(__file__).parent / "architectures"
_WINDOW = 77  # tokens of CLIP


@dataclass(frozen=True)
class Architecture:
    """A pipeline's class, and the config of each of its parts that has one."""

    pipeline: str
    parts: dict[str, dict[str, Any]]

    def model(self, device: str = "meta") -> DiffusionModel:
        """The model, without weights on the meta device, with random ones on another.

        Its tokenizers are stand-ins, which give any caption as many tokens as it has.

        Raises:
            ValueError: the family's class has no use for such a pipeline.
        """
        family = FAMILIES[self.pipeline]
        pipeline = getattr(diffusers, self.pipeline)
        names = list(pipeline._get_signature_keys(pipeline)[0])
        built: dict[str, Any] = {name: None for name in names if name not in self.parts}
        built |= {name: _build(config, device) for name, config in self.parts.items()}
        for encoder in [name for name in self.parts if name.startswith("text_encoder")]:
            window = self.parts[encoder].get("max_position_embeddings", _WINDOW)
            tokenizer = transformers.CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer", model_max_length=window)
            built[encoder.replace("text_encoder", "tokenizer")] = tokenizer
        return family.load()(pipeline(**built | dict(family.left_out)))


def architecture(pretrained: str, kind: Kind) -> Architecture:
    """The architecture of a diffusers folder, of which configs alone are read, or of a model that is known by hub id.

    Raises:
        ValueError: it is neither, or of another family.
    """
    check_pipeline("model.pretrained", pretrained, kind)
    if is_folder(pretrained):
        return _of_folder(Path(pretrained).expanduser())
    known = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(_KNOWN.glob("*.json"))]
    for found in known:
        if pretrained in found["models"]:
            check_family(f"model.pretrained={pretrained}", found["pipeline"], kind)
            return Architecture(found["pipeline"], found["parts"])
    models = [found["models"][0] for found in known if found["pipeline"] in FAMILIES]
    raise ValueError(
        f"model.pretrained={pretrained}: its configs are not known here; name a local folder (no weights are read), "
        f"or one of {', '.join(models)}"
    )


def _of_folder(folder: Path) -> Architecture:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    left_out, parts = FAMILIES[index["_class_name"]].left_out, {}
    for name in (name for name in index if name not in left_out):
        for file in (folder / name / "config.json", folder / name / "scheduler_config.json"):
            if file.is_file():
                parts[name] = json.loads(file.read_text(encoding="utf-8"))
    return Architecture(index["_class_name"], parts)


def _build(config: dict[str, Any], device: str) -> Any:
    """A part of a pipeline: of diffusers where its config names a class, else of transformers."""
    if "Scheduler" in config.get("_class_name", ""):
        return getattr(diffusers, config["_class_name"]).from_config(config)
    with torch.device(device):
        if "_class_name" in config:
            network: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
        else:
            kind = getattr(transformers, config["architectures"][0])
            network = kind(transformers.AutoConfig.for_model(**config))
    return network.eval()
