"""Stable Diffusion XL: two text encoders, a pooled embedding, sizes; the rest is as in Stable Diffusion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from memtrain.core.transfer import sent
from memtrain.models.conditioning import Conditioning
from memtrain.models.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL.

    Captions are encoded as of pictures of its own size that nothing was cropped from; what is trained on is told of
    its own size and crop (`Conditioning.sized`).
    """

    pipeline_class = StableDiffusionXLPipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    text_encoder_2: Any

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        self.null_is_zeros = pipeline.config.force_zeros_for_empty_prompt

    def freeze_unseen(self) -> None:
        last = f"layers.{self.text_encoder.config.num_hidden_layers - 1}."
        for name, parameter in self.text_encoder.named_parameters():
            if last in name or "final_layer_norm" in name:  # the network is told what is before these
                parameter.requires_grad_(False)

    def encode_or_null(self, captions: list[str]) -> Conditioning:
        encoded = self.encode(captions)
        if not self.null_is_zeros or all(captions):
            return encoded
        has_caption = torch.tensor([bool(caption) for caption in captions], device=self.device)
        return encoded.where(has_caption, self.null(len(captions)))

    def _encode(self, captions: list[str]) -> Conditioning:
        tokens = [sent(self._tokens(captions, tokenizer).input_ids, self.device) for tokenizer in self.tokenizers]
        outputs, seen = zip(*map(_last_but_one, self.text_encoders, tokens), strict=True)
        # the last layer but one of both, side by side; pooled is the second one's projection
        hidden = torch.cat(seen, dim=-1).to(self.text_encoder_2.dtype)
        height, width = self.own_size
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=hidden.dtype, device=hidden.device)
        return Conditioning(hidden, outputs[1][0], sizes.expand(len(hidden), -1))

    def _encode_null(self) -> Conditioning:
        null = super()._encode_null()
        if not self.null_is_zeros:
            return null
        return replace(null.map(torch.zeros_like), time_ids=null.time_ids)

    @contextmanager
    def _vae_in_range(self) -> Iterator[None]:
        dtype = self.vae.dtype
        overflows = dtype == torch.float16 and self.vae.config.force_upcast  # as the stock pipeline does
        if overflows:
            self.vae.to(dtype=torch.float32)
        try:
            with torch.autocast(self.device.type, enabled=False) if overflows else nullcontext():
                yield
        finally:
            if overflows:
                self.vae.to(dtype=dtype)

    def _pipeline_options(self) -> dict:
        return dict(force_zeros_for_empty_prompt=self.null_is_zeros, add_watermarker=False)


def _last_but_one(encoder: Any, tokens: Tensor) -> tuple[Any, Tensor]:
    """A text encoder's output, and that of its last layer but one, (B, L, D); transformers' own `output_hidden_states`
    is none where the encoder is sharded."""
    name = f"layers.{encoder.config.num_hidden_layers - 2}"
    layer = next(module for path, module in encoder.named_modules() if path.endswith(name))
    seen: list[Any] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        output = encoder(tokens)
    finally:
        hook.remove()
    return output, seen[0][0] if isinstance(seen[0], tuple) else seen[0]
