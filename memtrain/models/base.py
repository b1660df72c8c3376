"""What training asks of a model family. Another family is one small class with these members."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class DiffusionModel(Protocol):
    alphas_cumprod: Tensor  # (T,) float32
    prediction_type: str  # one of core.diffusion.PREDICTION_TYPES
    tokenizer: Any  # of transformers
    text_encoder_is_trained: bool  # its weights, or an adapter of it

    def tokenize(self, captions: list[str]) -> Tensor:
        """(B, L) int64; longer captions are cut, shorter ones padded."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a picture of this size in px. Raises ValueError where it cannot be had."""

    def encode_posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, height, width) uint8 -> mean and standard deviation of the latents, (B, C, H, W), unscaled."""

    def sample_latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """(B, C, H, W) scaled latents; noise 0 gives the posterior's mean."""

    def encode_captions(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, D) encoder_hidden_states."""

    def null_caption(self) -> Tensor:
        """(1, L, D) embedding of the empty caption; computed once where the text encoder is frozen."""

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """(B, C, H, W) the network's prediction, in its own parameterisation."""

    def fingerprint(self) -> dict[str, str]:
        """A hash of the weights of `vae` and `text_encoder`: what latents and embeddings depend on."""

    def trained_modules(self) -> Iterable[nn.Module]:
        """The modules whose weights are trained."""

    def prepare_frozen(self, dtype: torch.dtype) -> None:
        """Cast what is frozen to the training precision."""

    def pipeline(self) -> Any:
        """A stock diffusers pipeline over the current weights (shared, not copied)."""

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """Write a complete diffusers folder in safetensors."""


def trained_parameters(model: DiffusionModel) -> list[nn.Parameter]:
    """The weights that are trained: all of the trained modules', or an adapter's alone."""
    parameters = (parameter for module in model.trained_modules() for parameter in module.parameters())
    return [parameter for parameter in parameters if parameter.requires_grad]
