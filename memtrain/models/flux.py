"""Flux.1 dev and schnell: a transformer on a rectified flow, told of captions by a T5 and CLIP's pooled embedding."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from memtrain.core.transfer import sent
from memtrain.models.conditioning import Conditioning
from memtrain.models.flow_transformer import FlowTransformer

T5_TOKENS = 512  # of a caption, as the stock pipeline cuts and pads it


class Flux(FlowTransformer):
    """Flux.1 dev and schnell, which were distilled to draw without an unconditional prediction.

    Dev is told the guidance scale that it imitates: `guidance` in training, the command's own in an audit. What is
    scored is the difference between the caption and the empty caption, both told the same; what is drawn follows the
    caption alone, as in the stock pipeline. Schnell is told none. Captions are cut, rewritten and explained in T5's
    tokens; CLIP's pooled embedding goes with them.
    """

    pipeline_class = FluxPipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    packing = 4
    own_guidance_scale = 3.5  # the stock pipeline's
    text_encoder_2: Any
    tokenizer_2: Any

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        self.guidance = 1.0  # told where nothing is drawn, as in diffusers' training scripts
        self._t5_tokenizer = copy.copy(self.tokenizer_2)  # the pipeline's own may be of another length
        self._t5_tokenizer.model_max_length = T5_TOKENS

    # ---- captions

    @property
    def caption_tokenizer(self) -> Any:
        return self._t5_tokenizer

    @property
    def aligned_encoders(self) -> list[tuple[Any, Any]]:
        return [(self._t5_tokenizer, self.text_encoder_2)]  # of CLIP the network sees no tokens

    @property
    def trainable_encoder_names(self) -> tuple[str, ...]:
        return ("text_encoder",)  # a T5 stays as it is: with its dropout no step could be made again

    def _encode(self, captions: list[str]) -> Conditioning:
        clip = self.text_encoder(sent(self._tokens(captions, self.tokenizer).input_ids, self.device))
        hidden = self.text_encoder_2(self.tokenize(captions).to(self.device))[0]
        told = self.transformer.config.guidance_embeds
        guidance = torch.full((len(captions),), self.guidance, device=self.device) if told else None
        return Conditioning(hidden, clip.pooler_output, guidance=guidance)

    # ---- predictions

    def guidance_weight(self, guidance_scale: float) -> float:
        return 1.0

    def _call(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        rows, columns = (side // 2 for side in noisy_latents.shape[-2:])
        device = noisy_latents.device
        places = torch.cartesian_prod(*(torch.arange(count, device=device) for count in (1, rows, columns)))
        told = dict(
            hidden_states=pack(noisy_latents),
            timestep=self.noise_process.noise_level(timesteps),
            guidance=conditioning.guidance,
            pooled_projections=conditioning.pooled,
            encoder_hidden_states=conditioning.hidden,
        )
        text = torch.zeros(conditioning.hidden.shape[1], 3, device=device)
        v = self._transformed(told, txt_ids=text, img_ids=places.float())  # (rows columns, 3)
        return unpack(v, rows, columns)

    # ---- what comes of it

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height // self.scale_factor // 2, width // self.scale_factor // 2)


def pack(latents: Tensor) -> Tensor:
    """A token for 2 x 2 latents: (B, C, H, W) -> (B, H/2 W/2, 4C)."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """And back: (B, rows columns, 4C) -> (B, C, 2 rows, 2 columns)."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)
