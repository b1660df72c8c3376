"""Conditional and unconditional noise predictions of a stock diffusers pipeline, along its DDIM path.

Shapes: B rows (a row is one generation), L tokens, D width of the text embedding, C x H x W latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from memtrain.core.diffusion import PREDICTION_TYPES, to_noise
from memtrain.core.streams import Stream, place_seed
from memtrain.models.folders import AUDITED
from memtrain.models.lora_files import load_lora
from memtrain.models.pipelines import hash_weights, load_pipeline

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told about B prompts."""

    hidden: Tensor  # (B, L, D) encoder_hidden_states
    pooled: Tensor | None  # (B, P), SDXL only
    time_ids: Tensor | None  # (B, 6), SDXL only: original size, crop, target size

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        values = (getattr(self, field.name) for field in fields(self))
        return Conditioning(*(None if value is None else change(value) for value in values))

    def __len__(self) -> int:
        return len(self.hidden)

    def index(self, rows: list[int] | Tensor) -> Conditioning:
        return self._map(lambda value: value[rows])

    def expand(self, count: int) -> Conditioning:
        """One prompt, `count` rows."""
        return self._map(lambda value: value.expand(count, *value.shape[1:]))

    def to(self, *place) -> Conditioning:
        return self._map(lambda value: value.to(*place))

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        columns = zip(*([getattr(part, field.name) for field in fields(part)] for part in parts), strict=True)
        return Conditioning(*(None if column[0] is None else torch.cat(column) for column in columns))


class Denoiser:
    """The pipeline's own network, asked for the pair of predictions that scores are made of.

    Works with Stable Diffusion 1.x, 2.x (v-prediction included) and XL; changes nothing in the pipeline.
    """

    def __init__(self, pipeline: DiffusionPipeline):
        name = type(pipeline).__name__
        if not isinstance(pipeline, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
            raise ValueError(f"a {name} cannot be audited; {AUDITED.remedy}")
        for part in ("unet", "text_encoder", "tokenizer", "scheduler"):
            if getattr(pipeline, part) is None:
                raise ValueError(f"this {name} has no {part}; {AUDITED.remedy}")
        config = pipeline.scheduler.config
        if config.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
            raise ValueError(f"this {name} predicts {config.prediction_type}; {AUDITED.remedy}")
        if config.get("rescale_betas_zero_snr", False):
            raise ValueError(
                f"this {name} starts from zero signal (rescale_betas_zero_snr), where no noise can be told"
            )
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise ValueError(f"this {name} is guidance-distilled and has no unconditional prediction; {AUDITED.remedy}")
        if pipeline.unet.config.in_channels != pipeline.unet.config.out_channels:
            raise ValueError(f"this {name} takes a picture too (inpainting, upscaling); {AUDITED.remedy}")
        self.pipeline = pipeline
        self.tokenizer = pipeline.tokenizer
        self.device = pipeline._execution_device  # where an offloaded pipeline computes
        self.dtype = pipeline.unet.dtype
        self.is_xl = isinstance(pipeline, StableDiffusionXLPipeline)
        self.scheduler = DDIMScheduler.from_config(config, clip_sample=False)  # of our own: the pipeline's has state
        self.prediction_type = self.scheduler.config.prediction_type
        self.alphas_cumprod = self.scheduler.alphas_cumprod.float().to(self.device)
        side = pipeline.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        self.latent_shape = (pipeline.unet.config.in_channels, height, width)

    @staticmethod
    def of(pipeline: DiffusionPipeline) -> Denoiser:
        """A pipeline in hand, on its device, in its precision. Raises ValueError where it cannot be used."""
        return Denoiser(pipeline)

    @staticmethod
    def load(
        model: str, device: str | None = None, dtype: str = "float32", key: str = "model", lora: str | None = None
    ) -> Denoiser:
        """A diffusers folder (read offline) or a hub id; device None is the GPU where there is one. `key`: what
        the user called it. `lora`: an adapter to load into it, a folder or a file.

        Raises:
            ValueError: in one line, what is wrong with `model`, `device` or `dtype`.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        pipeline = load_pipeline(model, AUDITED, DTYPES[dtype], key=key)
        pipeline.set_progress_bar_config(disable=True)
        if lora is not None:
            load_lora(pipeline, lora)
        try:
            pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"device={device} cannot be used: {reason}; leave it out, or say device=cpu") from error
        return Denoiser(pipeline)

    # ---- what the network is told

    def _text_encoders(self) -> list[nn.Module]:
        first = self.pipeline.text_encoder
        return [first, self.pipeline.text_encoder_2] if self.is_xl else [first]

    def _conditioning(self, hidden: Tensor, pooled: Tensor | None) -> Conditioning:
        if not self.is_xl:
            return Conditioning(hidden, None, None)
        height, width = (side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=hidden.dtype, device=hidden.device)
        return Conditioning(hidden, pooled, sizes.expand(len(hidden), -1))

    def _encode(self, prompts: list[str]) -> Conditioning:
        encoded = self.pipeline.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return self._conditioning(encoded[0], encoded[2] if self.is_xl else None)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Text embeddings as the stock pipeline makes them; the empty one is the null prompt: it scores 0."""
        encoded = self._encode(prompts)
        empty = torch.tensor([prompt == "" for prompt in prompts], device=self.device)
        if empty.any():  # SDXL's null prompt may be zeros instead of an encoded ""
            rows = torch.arange(len(prompts), device=self.device).masked_fill(empty, len(prompts))
            encoded = Conditioning.cat([encoded, self.null(1)]).index(rows)
        return encoded

    @cached_property
    @torch.no_grad()
    def _null(self) -> Conditioning:
        if not self.is_xl:
            return self._encode([""])
        encoded = self.pipeline.encode_prompt(
            [""], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return self._conditioning(encoded[1], encoded[3])

    def null(self, count: int) -> Conditioning:
        """The stock pipeline's empty prompt, encoded once, `count` rows."""
        return self._null.expand(count)

    @torch.no_grad()
    def token_embeds(self, prompts: list[str]) -> Tensor:
        """Token embeddings before the text encoder, (B, L, E); SDXL's two encoders side by side in E."""
        tokenizers = [self.tokenizer, self.pipeline.tokenizer_2] if self.is_xl else [self.tokenizer]
        parts = [
            encoder.get_input_embeddings()(self.token_ids(prompts, tokenizer).to(self.device))
            for tokenizer, encoder in zip(tokenizers, self._text_encoders(), strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def token_ids(self, prompts: list[str], tokenizer=None) -> Tensor:
        """(B, L) int64, cut and padded as the pipeline does, with the first tokenizer if none is given."""
        tokenizer = tokenizer or self.tokenizer
        return tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids

    def encode_embeds(self, inputs_embeds: Tensor, prompts: list[str]) -> Conditioning:
        """The text encoder from token embeddings instead of tokens, differentiable.

        Args:
            inputs_embeds: (B, L, E), as `token_embeds` gives them.
            prompts: B prompts of the same tokens: they tell where the text ends (pooling, padding).
        """
        encoders = self._text_encoders()
        widths = [encoder.get_input_embeddings().embedding_dim for encoder in encoders]
        if inputs_embeds.shape[0] != len(prompts) or inputs_embeds.shape[-1] != sum(widths):
            raise ValueError(
                f"inputs_embeds must be (B, L, E) with B = {len(prompts)} prompts and E = {sum(widths)}, "
                f"got {tuple(inputs_embeds.shape)}"
            )
        with ExitStack() as stack:
            for encoder, part in zip(encoders, inputs_embeds.split(widths, dim=-1), strict=True):
                given = part.to(encoder.dtype)
                hook = encoder.get_input_embeddings().register_forward_hook(lambda *_, given=given: given)
                stack.callback(hook.remove)
            return self._encode(prompts)

    # ---- the path

    def noise(self, seeds: list[int]) -> Tensor:
        """x_T, (B, C, H, W) float32: a CPU generator a row, so that a row does not depend on its batch."""
        rows = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device)

    def timesteps(self, num_inference_steps: int) -> Tensor:
        """(num_inference_steps,) int64, falling: the stock pipeline's with a DDIM scheduler."""
        self.scheduler.set_timesteps(num_inference_steps)
        return self.scheduler.timesteps

    def predict(self, latents: Tensor, t: int | Tensor, conditioning: Conditioning) -> Tensor:
        """Noise predicted for B rows at one timestep, whatever the network predicts; (B, C, H, W) float32."""
        added = None
        if self.is_xl:
            added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        prediction = self.pipeline.unet(
            latents.to(self.dtype),
            t,
            encoder_hidden_states=conditioning.hidden,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        steps = torch.full((len(latents),), int(t), device=self.device)
        return to_noise(prediction.float(), latents.float(), steps, self.alphas_cumprod, self.prediction_type)

    def predict_pair(
        self, latents: Tensor, t: int | Tensor, cond: Conditioning, null: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Noise predicted with the prompt and with the empty one, in one forward of 2B rows, null first."""
        noise_null, noise_cond = self.predict(torch.cat([latents] * 2), t, Conditioning.cat([null, cond])).chunk(2)
        return noise_cond, noise_null

    def step(
        self,
        latents: Tensor,
        t: int | Tensor,
        noise_cond: Tensor,
        noise_null: Tensor,
        guidance_scale: float,
        num_inference_steps: int,
    ) -> Tensor:
        """x_t -> x_{t - T / num_inference_steps}: DDIM with eta = 0 (Song et al. 2021, eq. 12).

        Guided towards the prompt: eps = eps_null + guidance_scale (eps_cond - eps_null) (Ho & Salimans 2022).
        """
        noise = noise_null + guidance_scale * (noise_cond - noise_null)
        before = int(t) - self.scheduler.config.num_train_timesteps // num_inference_steps
        alpha = self.alphas_cumprod[int(t)]
        alpha_before = self.alphas_cumprod[before] if before >= 0 else self.scheduler.final_alpha_cumprod.to(alpha)
        clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        return alpha_before.sqrt() * clean + (1 - alpha_before).sqrt() * noise

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str] | Conditioning,
        seeds: list[int],
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Scaled latents (B, C, H, W) of one generation a prompt, each from a seed of its own."""
        cond = prompts if isinstance(prompts, Conditioning) else self.encode(prompts)
        null, latents = self.null(len(cond)), self.noise(seeds)
        for t in self.timesteps(num_inference_steps).tolist():
            pair = self.predict_pair(latents, t, cond, null)
            latents = self.step(latents, t, *pair, guidance_scale, num_inference_steps)
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Scaled latents (B, C, H, W) -> pictures (B, height, width, 3) uint8."""
        vae = self.pipeline.vae
        dtype = vae.dtype
        overflows = self.is_xl and dtype == torch.float16 and vae.config.force_upcast  # as the stock pipeline does
        if overflows:
            vae.to(dtype=torch.float32)
        try:
            pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        finally:
            if overflows:
                vae.to(dtype=dtype)
        return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def fingerprint(self) -> str:
        """A hash of the weights that scores depend on and of the noise schedule."""
        digest = hashlib.sha256(self.alphas_cumprod.cpu().numpy().tobytes())
        digest.update(f"{self.prediction_type} {self.latent_shape} {self.dtype}".encode())
        for module in (self.pipeline.unet, *self._text_encoders()):
            digest.update(hash_weights(module).encode())
        return digest.hexdigest()


def generation_seeds(prompt: str, count: int, seed: int, stream: Stream = Stream.AUDIT) -> list[int]:
    """Seeds of a prompt's x_T: a function of seed, prompt and generation, not of the list it came in."""
    key = int.from_bytes(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return [place_seed(seed, stream, key, generation) for generation in range(count)]
