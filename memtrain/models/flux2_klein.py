"""Flux.2 Klein: a transformer on a rectified flow, told of captions by three layers of a Qwen3."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from memtrain.models.conditioning import Conditioning
from memtrain.models.flow_transformer import FlowTransformer

TOKENS = 512  # of a caption and the chat around it, as the stock pipeline cuts and pads them
LAYERS = (9, 18, 27)  # of the language model, whose outputs stand side by side


class Flux2Klein(FlowTransformer):
    """Flux.2 Klein, base and distilled. The distilled one draws with the caption alone, as the stock pipeline does.

    Latents are those of 2 x 2 places of the VAE on top of each other, each channel normalised by the VAE's statistics.
    """

    pipeline_class = Flux2KleinPipeline
    packing = 4
    patch = 1
    own_guidance_scale = 4.0  # the stock pipeline's

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        self.scale_factor *= 2
        self.is_distilled = pipeline.config.is_distilled
        self._cut_tokenizer = copy.copy(self.tokenizer)
        self._cut_tokenizer.model_max_length = TOKENS - len(self.tokenizer(self._chat("")).input_ids)

    # ---- sigma

    def _mu(self, latent_shape: Sequence[int], num_inference_steps: int) -> float:
        return compute_empirical_mu(self._tokens_of(latent_shape), num_inference_steps)

    # ---- pictures

    @property
    def native_shape(self) -> tuple[int, int, int]:
        _, height, width = super().native_shape
        return self.transformer.config.in_channels, height, width

    def encode_posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().encode_posterior(images)
        return pixel_unshuffle(mean, 2), pixel_unshuffle(std, 2)

    def sample_latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        center, spread = self._statistics(mean)
        return (mean + std * noise - center) / spread

    def _unscaled(self, latents: Tensor) -> Tensor:
        center, spread = self._statistics(latents)
        return pixel_shuffle(latents * spread + center, 2)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (1, C, 1, 1)."""
        norm = self.vae.bn
        spread = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        center, spread = (values.reshape(1, -1, 1, 1).to(like) for values in (norm.running_mean, spread))
        return center, spread

    # ---- captions

    @property
    def caption_tokenizer(self) -> Any:
        return self._cut_tokenizer

    @property
    def trainable_encoder_names(self) -> tuple[str, ...]:
        return ()  # a language model stays as it is

    def caption_pieces(self, caption: str) -> list[tuple[int, int, int]]:
        before = len(self._chat("\0").partition("\0")[0])  # characters of the chat
        found = self.tokenizer(
            self._chat(caption), truncation=True, max_length=TOKENS, return_offsets_mapping=True
        ).offset_mapping
        places = [(place, start - before, end - before) for place, (start, end) in enumerate(found)]
        return [(place, start, end) for place, start, end in places if 0 <= start < end <= len(caption)]

    def _tokens(self, captions: list[str], tokenizer: Any) -> Any:
        chats = [self._chat(caption) for caption in captions]
        return self.tokenizer(chats, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")

    def _chat(self, caption: str) -> str:
        """What the language model reads in place of a caption."""
        said = [{"role": "user", "content": caption}]
        return self.tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def _encode(self, captions: list[str]) -> Conditioning:
        tokens = self._tokens(captions, self.tokenizer).to(self.device)
        output = self.text_encoder(**tokens, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        return Conditioning(torch.cat([output.hidden_states[layer] for layer in LAYERS], dim=-1))

    # ---- predictions

    def guidance_weight(self, guidance_scale: float) -> float:
        return 1.0 if self.is_distilled else max(1.0, guidance_scale)

    def _call(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        rows, device = len(noisy_latents), noisy_latents.device
        height, width = noisy_latents.shape[-2:]
        # where tokens are: time, row, column, place in the text
        image, text = (
            torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts)).expand(rows, -1, -1)
            for counts in ((1, height, width, 1), (1, 1, 1, conditioning.hidden.shape[1]))
        )
        v = self._transformed(dict(
            hidden_states=noisy_latents.flatten(2).transpose(1, 2),
            timestep=self.noise_process.noise_level(timesteps),
            encoder_hidden_states=conditioning.hidden,
            txt_ids=text,
            img_ids=image,
        ))  # fmt: skip
        return v.transpose(1, 2).unflatten(2, (height, width))

    # ---- what comes of it

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        packed = pixel_unshuffle(latents, 2)
        center, spread = self._statistics(packed)
        return (packed - center) / spread

    def _pipeline_options(self) -> dict:
        return dict(is_distilled=self.is_distilled)
