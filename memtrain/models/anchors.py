"""What a model was when its run began: the weights that the anchored magnitude compares with."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from memtrain.models.base import DiffusionModel


class Anchor(ABC):
    """Gives a model back the weights that its run began with, for forwards without a gradient."""

    fingerprint: Mapping[str, str]  # a hash of each network of which this keeps a copy

    @abstractmethod
    def in_place(self, model: DiffusionModel) -> contextlib.AbstractContextManager[None]:
        """Have the model be what it was, while the context lasts."""

    @abstractmethod
    def cost(self) -> str:
        """What it takes on each device, in words."""


class FrozenCopies(nn.Module, Anchor):
    """Copies of the networks whose weights are all trained, in their own precision: what was learnt since is then all
    that differs, and at the first step nothing does.

    Args:
        model: as the run begins; checkpoints are loaded into it later.
    """

    def __init__(self, model: DiffusionModel):
        super().__init__()
        trained = set(map(id, model.trained_modules()))
        networks = {name: getattr(model, name) for name in model.network_names}
        networks = {name: network for name, network in networks.items() if id(network) in trained}
        self.fingerprint = model.fingerprint(*networks)
        self.networks = nn.ModuleDict({name: copy.deepcopy(network) for name, network in networks.items()})
        self.requires_grad_(False).eval()
        if model.compiled:
            self.networks[model.network_name].compile()

    def train(self, mode: bool = True) -> FrozenCopies:
        return super().train(False)

    def in_place(self, model: DiffusionModel) -> contextlib.AbstractContextManager[None]:
        return exchanged(model, dict(self.networks.items()))

    def cost(self) -> str:
        taken = sum(parameter.numel() * parameter.element_size() for parameter in self.networks.parameters())
        return f"a frozen copy of {', '.join(self.networks)}, {taken / 2**20:.0f} MiB; adapter=lora needs none"


class AdapterOff(Anchor):
    """Networks without the adapter beside their weights, which the run leaves as they are: nothing is copied.

    Args:
        names: of the networks that have an adapter.
    """

    fingerprint: Mapping[str, str] = {}  # the adapter has that of its base

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)

    @contextlib.contextmanager
    def in_place(self, model: DiffusionModel) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        networks = (getattr(model, name) for name in self.names)
        layers = [layer for network in networks for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
        before = [layer._disable_adapters for layer in layers]
        null, model._null = model._null, None  # an adapter of the text encoder changes the empty caption too
        try:
            for layer in layers:
                layer._disable_adapters = True  # `enable_adapters` would also say anew what is trained, mid-step
            yield
        finally:
            model._null = null
            for layer, was in zip(layers, before, strict=True):
                layer._disable_adapters = was

    def cost(self) -> str:
        return "no copy, the adapter is switched off for it"


@contextlib.contextmanager
def exchanged(model: DiffusionModel, networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put these networks in the place of the model's own of the same names, while the context lasts."""
    own = {name: getattr(model, name) for name in networks}
    try:
        for name, network in networks.items():
            setattr(model, name, network)
        yield
    finally:
        for name, network in own.items():
            setattr(model, name, network)
