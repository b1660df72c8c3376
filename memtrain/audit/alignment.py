"""CLIP score: does a generation show what its caption says? (Hessel et al. 2021)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from memtrain.models.folders import CLIP, check_folder, is_folder


class ClipScore:
    """100 · max(cos, 0) between CLIP's embeddings of picture and caption, torchmetrics' scale.

    torchmetrics' own class fails with transformers 5.

    Args:
        clip: a folder with a CLIP model, tokenizer and image processor (read offline), or a hub id.
        device: where it computes.

    Raises:
        ValueError: in one line, `clip` cannot be had or is something else.
    """

    def __init__(self, clip: str, device: torch.device):
        self.clip, self.device = clip, device
        check_folder("clip", clip, CLIP)
        local = is_folder(clip)
        source = str(Path(clip).expanduser()) if local else clip
        try:
            kind = AutoConfig.from_pretrained(source, local_files_only=local).model_type
            if kind != "clip":
                raise ValueError(f"it holds a {kind} model")
            self.model = CLIPModel.from_pretrained(source, local_files_only=local, dtype=torch.float32)
            self.tokenizer = CLIPTokenizer.from_pretrained(source, local_files_only=local)
            self.processor = CLIPImageProcessorPil.from_pretrained(source, local_files_only=local)
        except Exception as error:  # whatever the hub, the cache or a damaged file raise; all end in one line
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"clip={clip} cannot be loaded: {reason}; {CLIP}") from error
        self.model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def scores(self, pixels: np.ndarray, captions: list[str]) -> Tensor:
        """(B, height, width, 3) uint8 and B captions -> (B,) on the CPU; long captions are cut."""
        images = self.processor([Image.fromarray(image) for image in pixels], return_tensors="pt")
        text = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        seen = self.model.get_image_features(pixel_values=images.pixel_values.to(self.device)).pooler_output
        said = self.model.get_text_features(
            input_ids=text.input_ids.to(self.device), attention_mask=text.attention_mask.to(self.device)
        ).pooler_output
        cosine = (normalize(seen.float(), dim=1) * normalize(said.float(), dim=1)).sum(dim=1)
        return 100 * cosine.clamp(min=0).cpu()

    def identity(self) -> str:
        return f"clip {self.clip}"
