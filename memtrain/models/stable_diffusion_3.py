"""Stable Diffusion 3 and 3.5: a transformer (MMDiT) on a rectified flow, two CLIP text encoders and maybe a T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn.functional import pad

from memtrain.core.transfer import sent
from memtrain.models.conditioning import Conditioning
from memtrain.models.flow_transformer import FlowTransformer
from memtrain.models.joint_attention import count_zero_tokens

T5_TOKENS = 256  # of a caption, as the stock pipeline cuts and pads it unless told otherwise
MOST_T5_TOKENS = 512  # that it can be told


class StableDiffusion3(FlowTransformer):
    """Stable Diffusion 3 and 3.5.

    A pipeline without T5 (`text_encoder_3` None) is told zeros in its place, as by the stock pipeline.
    """

    pipeline_class = StableDiffusion3Pipeline
    text_encoder_names: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    tokenizer_names: tuple[str, ...] = ("tokenizer", "tokenizer_2")
    text_encoder_2: Any
    text_encoder_3: Any
    tokenizer_3: Any
    max_sequence_length = T5_TOKENS

    def __init__(self, pipeline: DiffusionPipeline):
        if pipeline.text_encoder_3 is not None:
            self.text_encoder_names = (*self.text_encoder_names, "text_encoder_3")
            self.tokenizer_names = (*self.tokenizer_names, "tokenizer_3")
        super().__init__(pipeline)

    def _tokens_of(self, latent_shape: Sequence[int]) -> int:
        patch = self.transformer.config.patch_size
        return (latent_shape[1] // patch) * (latent_shape[2] // patch)

    def _schedule(self, num_inference_steps: int) -> dict[str, Any]:
        is_shifted = self.scheduler.config.get("use_dynamic_shifting")
        mu = {"mu": self._mu(self.own_shape, num_inference_steps)} if is_shifted else {}
        return {"num_inference_steps": num_inference_steps, **mu}

    # ---- pictures

    @property
    def native_shape(self) -> tuple[int, int, int]:
        side = self.transformer.config.sample_size
        return self.transformer.config.in_channels, side, side

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        multiple = self.scale_factor * self.transformer.config.patch_size
        largest = multiple * self.transformer.config.pos_embed_max_size
        for name, side in (("data.resolution", height), ("data.bucket_multiple", width)):
            name = "data.resolution" if height == width else name
            if side < multiple or side % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple} for this model, got {side}")
            if side > largest:
                raise ValueError(f"{name} must be at most {largest} for this model, got {side}")
        return self.vae.config.latent_channels, height // self.scale_factor, width // self.scale_factor

    # ---- captions and predictions

    @property
    def aligned_encoders(self) -> list[tuple[Any, Any]]:
        return super().aligned_encoders[:2]  # T5 has tokens of its own

    @property
    def trainable_encoder_names(self) -> tuple[str, ...]:
        return self.text_encoder_names[:2]  # a T5 stays as it is: with its dropout no step could be made again

    def cut_captions(self, max_sequence_length: int) -> None:
        if "text_encoder_3" not in self.text_encoder_names:
            super().cut_captions(max_sequence_length)
        if not 1 <= max_sequence_length <= MOST_T5_TOKENS:
            raise ValueError(f"max_sequence_length must be in [1, {MOST_T5_TOKENS}], got {max_sequence_length}")
        self.max_sequence_length = max_sequence_length

    @property
    def call_options(self) -> dict[str, int]:
        has_t5 = "text_encoder_3" in self.text_encoder_names
        return {"max_sequence_length": self.max_sequence_length} if has_t5 else {}

    def fingerprint(self, *names: str) -> dict[str, Any]:
        return super().fingerprint(*names) | ({} if names else self.call_options)

    def _encode(self, captions: list[str]) -> Conditioning:
        outputs = [
            encoder(sent(self._tokens(captions, tokenizer).input_ids, self.device), output_hidden_states=True)
            for tokenizer, encoder in self.aligned_encoders
        ]
        # the last layer but one of both CLIPs, side by side, zeros up to T5's width; after them T5's tokens
        dtype = self.text_encoder.dtype
        clip = torch.cat([output.hidden_states[-2].to(dtype) for output in outputs], dim=-1)
        clip = pad(clip, (0, self.transformer.config.joint_attention_dim - clip.shape[-1]))
        pooled = torch.cat([output[0] for output in outputs], dim=-1)
        return Conditioning(torch.cat([clip, self._encode_t5(captions).to(clip)], dim=1), pooled)

    def _encode_t5(self, captions: list[str]) -> Tensor:
        """(B, max_sequence_length, D); of all rows, padding too: T5 sees no mask, nor does the network."""
        if "text_encoder_3" not in self.text_encoder_names:
            width = self.transformer.config.joint_attention_dim
            return torch.zeros(len(captions), T5_TOKENS, width, device=self.device)
        tokens = self.tokenizer_3(
            list(captions),
            padding="max_length",
            max_length=self.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder_3(sent(tokens.input_ids, self.device))[0]

    def make_trainable(
        self, train_text_encoder: bool, gradient_checkpointing: bool, channels_last: bool, compile: bool
    ) -> None:
        super().make_trainable(train_text_encoder, gradient_checkpointing, channels_last, compile)
        if "text_encoder_3" not in self.text_encoder_names and not compile:  # a graph does not look at values
            count_zero_tokens(self.transformer, T5_TOKENS)

    def _call(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self._transformed(dict(
            hidden_states=noisy_latents,
            timestep=timesteps.float() + 1,  # T sigma
            encoder_hidden_states=conditioning.hidden,
            pooled_projections=conditioning.pooled,
        ))  # fmt: skip

    # ---- what comes of it

    def _pipeline_options(self) -> dict:
        return {} if "text_encoder_3" in self.text_encoder_names else dict(text_encoder_3=None, tokenizer_3=None)
