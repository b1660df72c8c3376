"""Stable Diffusion 1.x and 2.x, from any diffusers folder or hub id."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from memtrain.core.diffusion import PREDICTION_TYPES
from memtrain.models.folders import TRAINED
from memtrain.models.pipelines import hash_weights, load_pipeline


class StableDiffusion(nn.Module):
    """UNet (trained), text encoder (frozen or trained) and VAE (frozen). See `DiffusionModel`.

    Args:
        pretrained: diffusers folder or hub id.
        train_text_encoder: train the text encoder too.
        gradient_checkpointing: recompute activations in backward; slower, far less memory.
        channels_last: the UNet's memory format that convolutions prefer on recent GPUs.
        compile: `torch.compile` the UNet, for each size of picture twice: once for the forward that is trained, of
            one batch size, and once for forwards without a gradient, of any. Pipelines sample without it.
    """

    alphas_cumprod: Tensor  # a buffer

    def __init__(
        self,
        pretrained: str,
        train_text_encoder: bool,
        gradient_checkpointing: bool,
        channels_last: bool,
        compile: bool,
    ):
        super().__init__()
        pipeline = load_pipeline(pretrained, TRAINED, torch.float32, key="model.pretrained")
        self.unet, self.vae, self.text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
        self.tokenizer, self.scheduler = pipeline.tokenizer, pipeline.scheduler
        self.prediction_type = self.scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"model.pretrained={pretrained} predicts {self.prediction_type}; {TRAINED.remedy}")
        if self.unet.config.in_channels != self.vae.config.latent_channels:
            raise ValueError(
                f"model.pretrained={pretrained}: its UNet takes {self.unet.config.in_channels} channels, its VAE "
                f"gives {self.vae.config.latent_channels} (an inpainting or upscaling model?); {TRAINED.remedy}"
            )
        alphas_cumprod = DDPMScheduler.from_config(self.scheduler.config).alphas_cumprod
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)
        self.text_encoder_is_trained = train_text_encoder
        self._null_caption: Tensor | None = None

        for module in (self.unet, self.vae, self.text_encoder):
            module.requires_grad_(False)
        for module in self.trained_modules():
            module.requires_grad_(True)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if train_text_encoder:
                self.text_encoder.gradient_checkpointing_enable()
        self.vae.to(memory_format=torch.channels_last)  # encoding takes half the time on a CPU
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.compiled = compile
        if compile:
            self.unet.compile()
        self.train()

    def train(self, mode: bool = True) -> StableDiffusion:
        super().train(False)  # what is frozen stays in eval mode
        for module in self.trained_modules():
            module.train(mode)
        return self

    def trained_modules(self) -> Iterable[nn.Module]:
        return (self.unet, self.text_encoder) if self.text_encoder_is_trained else (self.unet,)

    def prepare_frozen(self, dtype: torch.dtype) -> None:
        nn.Module.to(self.vae, dtype)  # diffusers' own `to` warns of modules that nobody named
        if not self.text_encoder_is_trained:
            self.text_encoder.to(dtype)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        multiple = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        for name, side in (("data.resolution", height), ("data.bucket_multiple", width)):
            if side < multiple or side % multiple:
                name = "data.resolution" if height == width else name
                raise ValueError(f"{name} must be a multiple of {multiple} for this model, got {side}")
        return self.vae.config.latent_channels, height // factor, width // factor

    def tokenize(self, captions: list[str]) -> Tensor:
        return self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids

    @torch.no_grad()
    def encode_posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixel_values = (images.float() / 127.5 - 1).to(self.vae.dtype)
        posterior = self.vae.encode(pixel_values).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def sample_latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        return (mean + std * noise) * self.vae.config.scaling_factor

    def fingerprint(self) -> dict[str, str]:
        return {name: hash_weights(getattr(self, name)) for name in ("vae", "text_encoder")}

    def encode_captions(self, input_ids: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder_is_trained):
            return self.text_encoder(input_ids)[0]

    @torch.no_grad()
    def null_caption(self) -> Tensor:
        if self.text_encoder_is_trained:
            return self.encode_captions(self.tokenize([""]).to(self.alphas_cumprod.device))
        if self._null_caption is None or self._null_caption.device != self.alphas_cumprod.device:
            self._null_caption = self.encode_captions(self.tokenize([""]).to(self.alphas_cumprod.device))
        return self._null_caption

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        inputs = noisy_latents, timesteps, encoder_hidden_states
        if not self.compiled or torch.is_grad_enabled():
            return self.unet(*inputs, return_dict=False)[0]
        rows = len(noisy_latents)
        return self.unet(*map(_any_rows, inputs), return_dict=False)[0][:rows]

    def pipeline(self) -> StableDiffusionPipeline:
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(self.scheduler.config, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        pipeline = self.pipeline()
        pipeline.register_modules(
            scheduler=self.scheduler,
            **{
                name: nn.Module.to(  # type: ignore[call-overload] # torch's annotations lack memory_format
                    copy.deepcopy(getattr(self, name)), "cpu", dtype, memory_format=torch.contiguous_format
                )
                for name in ("unet", "vae", "text_encoder")
            },
        )
        pipeline.save_pretrained(folder, safe_serialization=True)


def _any_rows(tensor: Tensor) -> Tensor:
    """B rows as one compiled graph takes them, whatever B is: a graph holds for one memory layout, and not for both
    one row and several."""
    rows = tensor.detach().expand(max(2, len(tensor)), *tensor.shape[1:]).contiguous()
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    return rows
