"""Does a generation show what its caption says? By CLIP (Hessel et al. 2021), or by a diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser
from memtrain.audit.pictures import encode_images
from memtrain.core.streams import Stream, place_seed
from memtrain.models.folders import CLIP, check_folder, is_folder

_MARGIN_TIMESTEPS = (100, 200, 300, 400, 500, 600, 700, 800, 900)  # of 1000


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


def caption_margin(
    judge: Denoiser, images: np.ndarray, prompts: Sequence[str], seeds: Sequence[int], batches: ShrinkingBatches
) -> Tensor:
    """`latents_margin` of R pictures, (R, height, width, 3) uint8. (R,)"""
    return latents_margin(judge, encode_images(judge, images, batches), prompts, seeds, batches)


@torch.no_grad()
def latents_margin(
    judge: Denoiser, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int], batches: ShrinkingBatches
) -> Tensor:
    """(R,) by how much the prompt lowers another model's denoising loss on a picture: 1 - loss_c / loss_null.

    A stand-in for a CLIP score where there is no CLIP: how much of the prompt a judge that has memorized
    nothing finds in the picture, over fixed timesteps and noise (the idea of Li et al. 2023, *Your Diffusion
    Model is Secretly a Zero-Shot Classifier*). Negative where the picture shows something else.

    Args:
        latents: (R, C, H, W) scaled.
    """

    def work(rows: range) -> Tensor:
        clean, count = latents[rows.start : rows.stop].to(judge.device), len(rows)
        cond, null = judge.encode([prompts[row] for row in rows]), judge.model.null(count)
        losses = torch.zeros(2, count, device=judge.device)
        for t in _MARGIN_TIMESTEPS:
            noise = judge.noise([place_seed(seeds[row], Stream.MARGIN, t, 0) for row in rows])
            steps = torch.full((count,), t, device=judge.device)
            noisy = judge.model.noise_process.add_noise(clean, noise, steps)
            pair = judge.predict_pair(noisy, t, cond, null)
            for loss, predicted in zip(losses, (pair.noise_cond, pair.noise_null), strict=True):
                loss += (predicted - noise).square().flatten(1).mean(dim=1)
        return (1 - losses[0] / losses[1]).cpu()

    return torch.cat(list(batches.over(len(latents), work)))
