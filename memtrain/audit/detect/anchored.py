"""The anchored score of a finished model: how far it lies from the weights that it was trained from."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

from diffusers import DiffusionPipeline
from torch import Tensor

from memtrain.audit.denoiser import Denoiser
from memtrain.audit.detect.scores import ScoredStep, StepScore
from memtrain.core import scores as equations
from memtrain.models.anchors import AdapterOff


@dataclass(frozen=True)
class Anchored(StepScore):
    """Anchored magnitude: of the noise predicted with the prompt, less what the base predicts at the same x_t.

    `against` and `without_adapter` make it.
    """

    identity: str  # a hash of the base's weights
    base: Denoiser = field(repr=False)
    off: AdapterOff | None = field(repr=False)  # in whose context `base` is the base
    name = "anchored"
    extra_evaluations = 1

    @staticmethod
    def against(base: DiffusionPipeline | Denoiser) -> Anchored:
        """Against the model that another was trained from. Raises ValueError where it cannot be used."""
        denoiser = base if isinstance(base, Denoiser) else Denoiser.of(base)
        return Anchored(denoiser.fingerprint(), denoiser, None)

    @staticmethod
    def without_adapter(denoiser: Denoiser) -> Anchored:
        """Against the same model with its adapter switched off; nothing is loaded twice."""
        model = denoiser.model
        off = AdapterOff([model.network_name, *model.text_encoder_names])
        with off.in_place(model):
            return Anchored(denoiser.fingerprint(), denoiser, off)

    def at(self, denoiser: Denoiser, step: ScoredStep) -> Tensor:
        if type(self.base.model) is not type(denoiser.model):
            own, other = (type(one.model).__name__ for one in (denoiser, self.base))
            raise ValueError(f"the base is a {other} and the model a {own}; name what the model was trained from")
        with nullcontext() if self.off is None else self.off.in_place(self.base.model):
            told = self.base.encode(step.prompts).guided(denoiser.guidance_scale)
            noise = self.base.predict_comparable(step.latents, step.t, told)
        return equations.anchored_magnitude(step.predicted.noise_cond, noise)
