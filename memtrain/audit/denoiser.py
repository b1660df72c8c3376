"""Conditional and unconditional predictions of a finished model.

Shapes: B rows (a row is one generation), L tokens, D width of the text embedding, C x H x W latents.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from memtrain.core.diffusion import DDPM
from memtrain.core.streams import Stream, place_seed
from memtrain.models.base import DiffusionModel
from memtrain.models.conditioning import Conditioning
from memtrain.models.families import family_of
from memtrain.models.folders import AUDITED
from memtrain.models.lora_files import load_lora
from memtrain.models.pipelines import load_pipeline
from memtrain.models.samplers import Predictions
from memtrain.models.t5 import set_t5_padding

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class AsTrained:
    """How a model was trained, where its files do not say it.

    Args:
        max_sequence_length: tokens of a prompt in T5; None: as the stock pipeline has it.
        t5_padding: see `memtrain.models.t5.set_t5_padding`.
        resolution: side of its pictures in px; None: of those that the stock pipeline draws.
    """

    max_sequence_length: int | None = None
    t5_padding: str = "encoded"
    resolution: int | None = None

    def tell(self, model: DiffusionModel) -> None:
        """Raises ValueError where a model cannot have it."""
        if self.max_sequence_length is not None:
            model.cut_captions(self.max_sequence_length)
        set_t5_padding(model, self.t5_padding)
        if self.resolution is not None:
            try:
                model.draw_at(self.resolution)
            except ValueError as error:
                raise ValueError(str(error).replace("data.resolution", "resolution")) from None


class Denoiser:
    """A model, asked for the pair of predictions that scores are made of.

    Works with every family of `memtrain.models.families`; changes nothing in the pipeline.
    """

    def __init__(self, pipeline: DiffusionPipeline):
        name, family = type(pipeline).__name__, family_of(pipeline)
        if family is None:
            raise ValueError(f"a {name} cannot be audited; {AUDITED.remedy}")
        try:
            self.model = family.load()(pipeline)
        except ValueError as error:
            raise ValueError(f"{error}; {AUDITED.remedy}") from None
        process = self.model.noise_process
        if isinstance(process, DDPM) and process.prediction_type == "epsilon" and process.alphas_cumprod[-1] == 0:
            raise ValueError(
                f"this {name} starts from zero signal (rescale_betas_zero_snr), where the noise that it predicts "
                "tells of no picture"
            )
        self.device, self.dtype = self.model.device, self.model.network.dtype
        self.guidance_scale = self.model.own_guidance_scale  # of pictures; told where the network is told of one

    @staticmethod
    def of(pipeline: DiffusionPipeline) -> Denoiser:
        """A pipeline in hand, on its device, in its precision. Raises ValueError where it cannot be used."""
        return Denoiser(pipeline)

    @staticmethod
    def load(
        model: str,
        device: str | None = None,
        dtype: str = "float32",
        key: str = "model",
        lora: str | None = None,
        config: str | None = None,
        as_trained: AsTrained | None = None,
    ) -> Denoiser:
        """A diffusers folder (read offline), a hub id or a .safetensors file; device None is the GPU where there is
        one. `key`: what the user called it. `lora`: an adapter to load into it, a folder or a file.
        `config`: of a file, see `memtrain.models.single_files.load_single_file`.
        `as_trained`: what its files do not say.

        Raises:
            ValueError: in one line, what is wrong with `model`, `device` or `dtype`.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        pipeline = load_pipeline(model, AUDITED, DTYPES[dtype], key=key, config=config)
        if lora is not None:
            load_lora(pipeline, lora)
        try:
            pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"device={device} cannot be used: {reason}; leave it out, or say device=cpu") from error
        denoiser = Denoiser(pipeline)
        (as_trained or AsTrained()).tell(denoiser.model)
        return denoiser

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures that it is asked for."""
        return self.model.own_shape

    def guided(self, guidance_scale: float | None) -> Denoiser:
        """The same model, asked for the pairs of pictures that are drawn with this scale; None: the family's own."""
        guided = copy.copy(self)
        guided.guidance_scale = self.model.own_guidance_scale if guidance_scale is None else guidance_scale
        return guided

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Text embeddings as the stock pipeline makes them; the empty one is the null prompt: it scores 0."""
        encoded = self.model.encode(prompts)
        empty = torch.tensor([prompt == "" for prompt in prompts], device=self.device)
        if empty.any():  # a null prompt may be zeros instead of an encoded ""
            rows = torch.arange(len(prompts), device=self.device).masked_fill(empty, len(prompts))
            encoded = Conditioning.cat([encoded, self.model.null(1)]).index(rows)
        return encoded

    def noise(self, seeds: list[int]) -> Tensor:
        """x_T, (B, C, H, W) float32: a CPU generator a row, so that a row does not depend on its batch."""
        rows = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device)

    def predict_noise(self, latents: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Noise predicted for B rows at one timestep, whatever the network predicts; (B, C, H, W) float32."""
        timesteps = torch.full((len(latents),), t, device=self.device)
        return self.model.to_noise(self._predict(latents, timesteps, conditioning), latents.float(), timesteps)

    def predict_comparable(self, latents: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """One side of a pair as `predict_pair` gives it: comparable where x_t is all noise, too."""
        timesteps = torch.full((len(latents),), t, device=self.device)
        prediction = self._predict(latents, timesteps, conditioning)
        return self.model.noise_process.comparable(prediction, latents.float(), timesteps)

    def predict_one(self, latents: Tensor, t: float, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """One side of a pair as `predict_pair` gives it: what the network says, and what scores compare."""
        timesteps = torch.full((len(latents),), t, device=self.device)
        prediction = self._predict(latents, timesteps, conditioning.guided(self.guidance_scale))
        return prediction, self.model.noise_process.comparable(prediction, latents.float(), timesteps)

    def predict_pair(self, latents: Tensor, t: float, cond: Conditioning, null: Conditioning) -> Predictions:
        """Predicted with the prompt and with the empty one, in one forward of 2B rows, null first."""
        conditioning = Conditioning.cat([null, cond]).guided(self.guidance_scale)
        latents = torch.cat([latents] * 2)
        timesteps = torch.full((len(latents),), t, device=self.device)
        prediction = self._predict(latents, timesteps, conditioning)
        noise = self.model.noise_process.comparable(prediction, latents.float(), timesteps)
        (null_prediction, cond_prediction), (null_noise, cond_noise) = prediction.chunk(2), noise.chunk(2)
        return Predictions(cond_prediction, null_prediction, cond_noise, null_noise)

    def _predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.model.predict(latents.to(self.dtype), timesteps, conditioning).float()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No gradient for weights meanwhile: autograd then keeps far fewer activations."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in trained:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in trained:
                weight.requires_grad_(True)

    def fingerprint(self) -> str:
        """A hash of the weights that scores depend on and of the noise schedule."""
        model = self.model
        digest = hashlib.sha256(model.sampler.identity())
        digest.update(f" {self.latent_shape} {self.dtype}".encode())
        for hashed in model.fingerprint(model.network_name, *model.text_encoder_names).values():
            digest.update(hashed.encode())
        told = {name: getattr(model, name, None) for name in ("t5_padding", "null_is_zeros")}
        for option in (model.call_options | {name: value for name, value in told.items() if value is not None}).items():
            digest.update(str(option).encode())
        return digest.hexdigest()


def generation_seeds(prompt: str, count: int, seed: int, stream: Stream = Stream.AUDIT) -> list[int]:
    """Seeds of a prompt's x_T: a function of seed, prompt and generation, not of the list it came in."""
    key = _key_of(prompt)
    return [place_seed(seed, stream, key, generation) for generation in range(count)]


def shared_seeds(prompt: str, count: int, seed: int, shared: int) -> list[int]:
    """The same out of `shared` seeds that all prompts have in common: different ones, drawn by seed and prompt."""
    drawn = np.random.default_rng(place_seed(seed, Stream.SHARED_NOISE, _key_of(prompt), 0))
    return [place_seed(seed, Stream.SHARED_NOISE, 0, int(place)) for place in drawn.permutation(shared)[:count]]


def _key_of(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:8], "big")
