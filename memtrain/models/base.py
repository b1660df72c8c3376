"""What a model family is: one class, which training and auditing ask alike.

Shapes: B rows, L tokens, D width of the text embedding, E of a token embedding, C x H x W latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn

from memtrain.core.diffusion import NoiseProcess
from memtrain.core.transfer import sent
from memtrain.models.conditioning import Conditioning
from memtrain.models.pipelines import hash_weights
from memtrain.models.samplers import Sampler


class DiffusionModel(nn.Module, ABC):
    """The networks of a stock diffusers pipeline, and how they are used.

    Made of a pipeline in hand it holds the pipeline's own modules, where and as they are, and changes nothing in
    them. `memtrain.models.pretrained` makes one of modules of its own, ready to be trained.

    Args:
        pipeline: of this family's class.

    Raises:
        ValueError: the pipeline lacks something, or predicts something of which no noise can be made.
    """

    network_name: ClassVar[str]  # of the network that predicts, in the pipeline
    text_encoder_names: tuple[str, ...]
    tokenizer_names: tuple[str, ...]

    vae: Any  # of diffusers; None where a pipeline in hand has none: then there are no pictures
    scheduler: Any  # of diffusers, the pipeline's own
    own_guidance_scale: ClassVar[float] = 7.5  # that an audit draws with unless told another
    noise_process: NoiseProcess  # its schedule lies where the model computes
    sampler: Sampler  # how pictures are drawn, in an audit and by `pipeline()`

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__()
        name = type(pipeline).__name__
        for part in (self.network_name, *self.text_encoder_names, *self.tokenizer_names, "scheduler"):
            if getattr(pipeline, part) is None:
                raise ValueError(f"this {name} has no {part}")
        for part in (*self.network_names, *self.tokenizer_names, "scheduler"):
            setattr(self, part, getattr(pipeline, part))
        self.scale_factor = pipeline.vae_scale_factor  # px of a latent's side
        self.text_encoder_is_trained = self.compiled = False
        self.quantization: str | None = None  # of the network's linear layers
        self.t5_padding: str | None = None  # where it is not the stock pipeline's
        self._null: Conditioning | None = None
        self._drawn_shape: tuple[int, int, int] | None = None  # of latents, where it is not the pipeline's own

    # ---- its parts

    @property
    def network_names(self) -> tuple[str, ...]:
        """All that has weights."""
        return (self.network_name, "vae", *self.text_encoder_names)

    @property
    def network(self) -> Any:
        """The network that predicts, a module of diffusers."""
        return getattr(self, self.network_name)

    @property
    def text_encoders(self) -> list[Any]:
        """Those of transformers, in the order in which their embeddings stand side by side."""
        return [getattr(self, name) for name in self.text_encoder_names]

    @property
    def tokenizers(self) -> list[Any]:
        """Those of transformers, one a text encoder."""
        return [getattr(self, name) for name in self.tokenizer_names]

    @property
    def caption_tokenizer(self) -> Any:
        """The one in whose tokens captions are cut, rewritten and explained; its `model_max_length` is how many of
        them, special ones included, a caption may have."""
        return self.tokenizers[0]

    @property
    def aligned_encoders(self) -> list[tuple[Any, Any]]:
        """Tokenizer and text encoder of those that cut a caption into the tokens of `caption_tokenizer`."""
        return list(zip(self.tokenizers, self.text_encoders, strict=True))

    @property
    def trainable_encoder_names(self) -> tuple[str, ...]:
        """Of the text encoders that are trained where text encoders are."""
        return self.text_encoder_names

    @property
    def device(self) -> torch.device:
        """Where it computes; its networks are there, or are brought there by the pipeline's own hooks."""
        return self.noise_process.device

    def fingerprint(self, *names: str) -> dict[str, str]:
        """A hash of the weights of these networks, by name; else the family, and of what latents and embeddings
        depend on."""
        if not names:
            padding = {} if self.t5_padding is None else {"t5_padding": self.t5_padding}
            return {"family": type(self).__name__} | self.fingerprint("vae", *self.text_encoder_names) | padding
        return {name: hash_weights(getattr(self, name)) for name in names}

    # ---- what is trained

    def make_trainable(
        self, train_text_encoder: bool, gradient_checkpointing: bool, channels_last: bool, compile: bool
    ) -> None:
        """Train the network that predicts, freeze the VAE, freeze or train the text encoders.

        See `memtrain.models.pretrained.from_pretrained`; modules of a pipeline in somebody's hand are not for this.

        Raises:
            ValueError: the family has no text encoder that can be trained.
        """
        if train_text_encoder:
            self.check_trains_text("model.train_text_encoder")
        self.text_encoder_is_trained, self.compiled = train_text_encoder, compile
        self.requires_grad_(False)
        for module in self.trained_modules():
            module.requires_grad_(True)
        self.freeze_unseen()
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
            for encoder in self.text_encoders if train_text_encoder else ():
                encoder.gradient_checkpointing_enable()
        self.vae.to(memory_format=torch.channels_last)  # encoding takes half the time on a CPU
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        if compile:
            self.network.compile()
        self.train()

    def check_trains_text(self, key: str) -> None:
        """Raises ValueError where no text encoder is trained, whatever `key` says."""
        if not self.trainable_encoder_names:
            raise ValueError(f"{key}=true: the text encoder of a {type(self).__name__} stays as it is; leave it out")

    def freeze_unseen(self) -> None:
        """Freeze weights of trained modules that no prediction depends on: they have no gradient, and ranks would wait
        for one."""

    def trained_modules(self) -> Iterable[nn.Module]:
        """The modules whose weights are trained."""
        names = self.trainable_encoder_names if self.text_encoder_is_trained else ()
        return (self.network, *(getattr(self, name) for name in names))

    def train(self, mode: bool = True) -> DiffusionModel:
        super().train(False)  # what is frozen stays in eval mode
        for module in self.trained_modules():
            module.train(mode)
        return self

    def prepare_frozen(self, dtype: torch.dtype) -> None:
        """Cast what is frozen to the training precision."""
        nn.Module.to(self.vae, dtype)  # diffusers' own `to` warns of modules that nobody named
        trained = set(map(id, self.trained_modules()))
        for encoder in self.text_encoders:
            if id(encoder) not in trained:
                encoder.to(dtype)

    # ---- pictures

    @property
    @abstractmethod
    def native_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents of the pictures that the stock pipeline draws, unless told otherwise."""

    @property
    def own_shape(self) -> tuple[int, int, int]:
        """The same, or what `draw_at` said."""
        return self._drawn_shape or self.native_shape

    def draw_at(self, resolution: int) -> None:
        """From here on its own pictures have this side, in px. Raises ValueError where it cannot have it."""
        self._drawn_shape = self.latent_shape(resolution, resolution)
        self._null = None  # XL's is told of the size

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width of these pictures, in px."""
        height, width = (side * self.scale_factor for side in self.own_shape[1:])
        return height, width

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a picture of this size in px. Raises ValueError where it cannot be had."""

    @abstractmethod
    def encode_posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, height, width) uint8 -> mean and standard deviation of the latents, (B, C, H, W), unscaled."""

    @abstractmethod
    def sample_latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """(B, C, H, W) scaled latents; noise 0 gives the posterior's mean."""

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """Scaled latents (B, C, H, W) -> pictures (B, height, width, 3) uint8."""

    # ---- captions

    def tokenize(self, captions: list[str]) -> Tensor:
        """(B, L) int64 of `caption_tokenizer`; longer captions are cut, shorter ones padded."""
        return self._tokens(captions, self.caption_tokenizer).input_ids

    def caption_pieces(self, caption: str) -> list[tuple[int, int, int]]:
        """What the tokens of a caption stand for: (place among those that `tokenize` gives, first character, end).

        Tokens that stand for no text, such as start and end, have none.
        """
        tokenizer = self.caption_tokenizer
        found = tokenizer(caption, truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True)
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return [
            (place, start, end)
            for place, (token, (start, end)) in enumerate(zip(found.input_ids, found.offset_mapping, strict=True))
            if token not in ends and end > start
        ]

    def encode(self, captions: list[str]) -> Conditioning:
        """Captions as the stock pipeline encodes them, with a gradient where text encoders are trained."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder_is_trained):
            return self._encode(captions)

    def encode_or_null(self, captions: list[str]) -> Conditioning:
        """Captions as `encode` gives them, but the empty one as `null` does: what is trained on."""
        return self.encode(captions)  # of most families they are the same

    @torch.no_grad()
    def null(self, count: int) -> Conditioning:
        """The empty caption, as the stock pipeline's guidance has it, `count` rows.

        It is encoded once where the text encoders are frozen.
        """
        if self.text_encoder_is_trained:
            return self._encode_null().expand(count)
        if self._null is None or self._null.hidden.device != self.device:
            self._null = self._encode_null()
        return self._null.expand(count)

    @torch.no_grad()
    def token_embeds(self, captions: list[str]) -> Tensor:
        """Token embeddings before the aligned text encoders, (B, L, E), those of several side by side in E."""
        parts = [
            encoder.get_input_embeddings()(sent(self._tokens(captions, tokenizer).input_ids, self.device))
            for tokenizer, encoder in self.aligned_encoders
        ]
        return torch.cat(parts, dim=-1)

    def encode_embeds(self, inputs_embeds: Tensor, captions: list[str]) -> Conditioning:
        """The text encoders from token embeddings instead of tokens, differentiable.

        Args:
            inputs_embeds: (B, L, E), as `token_embeds` gives them.
            captions: B of the same tokens: they tell where the text ends (pooling, padding).
        """
        encoders = [encoder for _, encoder in self.aligned_encoders]
        widths = [encoder.get_input_embeddings().embedding_dim for encoder in encoders]
        if inputs_embeds.shape[0] != len(captions) or inputs_embeds.shape[-1] != sum(widths):
            raise ValueError(
                f"inputs_embeds must be (B, L, E) with B = {len(captions)} prompts and E = {sum(widths)}, "
                f"got {tuple(inputs_embeds.shape)}"
            )
        with ExitStack() as stack:
            for encoder, part in zip(encoders, inputs_embeds.split(widths, dim=-1), strict=True):
                given = part.to(encoder.dtype)
                table = encoder.get_input_embeddings().weight  # of a T5 it is in two modules, one of which is called
                for module in encoder.modules():
                    if isinstance(module, nn.Embedding) and module.weight is table:
                        hook = module.register_forward_hook(lambda *_, given=given: given)
                        stack.callback(hook.remove)
            return self._encode(captions)

    def _tokens(self, captions: list[str], tokenizer: Any) -> Any:
        """What a tokenizer makes of B captions: input_ids and attention_mask, (B, L) each."""
        learnt = tokenizer.added_tokens_encoder
        if any(f"{token}_1" in learnt for token in learnt):  # a textual inversion of several vectors
            captions = TextualInversionLoaderMixin().maybe_convert_prompt(list(captions), tokenizer)
        return tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )

    def cut_captions(self, max_sequence_length: int) -> None:
        """Have captions be of so many tokens, padding included, where the stock pipeline's call takes the number."""
        raise ValueError(
            f"max_sequence_length={max_sequence_length} is for Stable Diffusion 3 with a T5, which this "
            f"{type(self).__name__} is not; leave it out"
        )

    @property
    def call_options(self) -> dict[str, int]:
        """What the stock pipeline is called with, so that it encodes captions as `encode` does."""
        return {}

    @abstractmethod
    def _encode(self, captions: list[str]) -> Conditioning:
        """Captions, encoded with whatever gradient there is."""

    def _encode_null(self) -> Conditioning:
        return self._encode([""])

    # ---- predictions

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """(B, C, H, W) what the network predicts, as it predicts it. timesteps (B,), int64 but on a flow's path"""
        if not self.compiled or torch.is_grad_enabled():
            return self._call(noisy_latents, timesteps, conditioning)
        rows = len(noisy_latents)
        return self._call(_any_rows(noisy_latents), _any_rows(timesteps), conditioning.map(_any_rows))[:rows]

    def to_noise(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction stands for, (B, C, H, W): scores are taken between noises."""
        return self.noise_process.to_noise(prediction, noisy_latents, timesteps)

    @abstractmethod
    def _call(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's forward."""

    def guidance_weight(self, guidance_scale: float) -> float:
        """w of a step along null + w (cond - null), where the stock pipeline is given this `guidance_scale`: up to 1 it
        asks for the caption's prediction alone."""
        return max(1.0, guidance_scale)

    # ---- what comes of it

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """A stock diffusers pipeline over the current weights (shared, not copied), which draws as `sampler` does."""

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """Start noise (B, C, H, W) as that pipeline takes its `latents`."""
        return latents

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Scaled latents (B, C, H, W) of what that pipeline gives as `latent` for pictures of this size in px."""
        return latents

    @abstractmethod
    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """Write a complete diffusers folder in safetensors."""


def trained_parameters(model: DiffusionModel) -> list[nn.Parameter]:
    """The weights that are trained: all of the trained modules', or an adapter's alone."""
    parameters = (parameter for module in model.trained_modules() for parameter in module.parameters())
    return [parameter for parameter in parameters if parameter.requires_grad]


def _any_rows(tensor: Tensor) -> Tensor:
    """B rows as one compiled graph takes them, whatever B is: a graph holds for one memory layout, and not for both
    one row and several."""
    rows = tensor.detach().expand(max(2, len(tensor)), *tensor.shape[1:]).contiguous()
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    return rows
