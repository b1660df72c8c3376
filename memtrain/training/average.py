"""The average of the trained weights over steps (EMA): begun, advanced, put in their place, saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from memtrain.models.base import DiffusionModel, trained_parameters
from memtrain.training import strategy


class AveragedWeights:
    """The exponential moving average of the trained weights; where none is kept, they stand for it themselves.

    Args:
        decay: with warm-up; 0 keeps no average.
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay must be in [0, 1), got {decay:g}; 0 keeps no average")
        self.decay = decay
        self._ema: EMAModel | None = None

    @property
    def shadow_params(self) -> Sequence[Tensor]:
        """The averaged weights, in the order of `trained_parameters`; sharded as these are."""
        return self._ema.shadow_params if self._ema else self._trained

    def begin(self, model: DiffusionModel, bones: dict[str, nn.Module]) -> None:
        """Start from the weights as they are now; `bones` as `strategy.shard_trained` gives them."""
        self._model, self._bones = model, bones
        self._trained = trained_parameters(model)
        if self.decay:
            self._ema = EMAModel(self._trained, decay=self.decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def to(self, device: torch.device) -> None:
        if self._ema:
            self._ema.to(device)

    def step(self) -> None:
        if self._ema:
            self._ema.step(self._trained)

    @contextlib.contextmanager
    def in_place(self, others: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Put the average in the place of the trained weights while the context lasts; all ranks enter together.

        Where weights are sharded, whole networks take their place, which each rank may run as often as it
        likes.

        Args:
            others: whole weights in the order of `trained_parameters` that take their place instead of the average.
        """
        if self._bones:
            sharded = {name: getattr(self._model, name) for name in self._bones}
            own = self.shadow_params
            weights = iter(own if others is None else [o.to(like.device) for o, like in zip(others, own, strict=True)])
            for name, bones in self._bones.items():
                setattr(self._model, name, strategy.filled(bones, sharded[name], weights))
            try:
                yield
            finally:
                for name, module in sharded.items():
                    setattr(self._model, name, module)
        else:
            own = [parameter.data for parameter in self._trained]
            for parameter, other in zip(self._trained, self.shadow_params if others is None else others, strict=True):
                parameter.data = other.data.to(parameter.device)  # where it is there already, nothing is copied
            try:
                yield
            finally:
                for parameter, data in zip(self._trained, own, strict=True):
                    parameter.data = data

    def state_dict(self) -> dict | None:
        if self._ema is None:
            return None
        whole = [strategy.whole(parameter) for parameter in self._ema.shadow_params]
        return self._ema.state_dict() | {"shadow_params": whole}

    def load_state_dict(self, state: dict | None) -> None:
        if self._ema and state:
            own = self._ema.shadow_params
            # it would copy the weights that it is given; and the decay is this run's
            self._ema.load_state_dict(state | {"shadow_params": [], "decay": self.decay})
            self._ema.shadow_params = own
            with torch.no_grad():
                for loaded, tensor in zip(state["shadow_params"], own, strict=True):
                    tensor.copy_(strategy.cut_like(loaded, tensor))
