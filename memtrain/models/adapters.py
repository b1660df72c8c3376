"""What is trained of a model's networks: all their weights, or a small adapter beside them, through peft."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from memtrain.core.streams import Stream, place_seed
from memtrain.models.anchors import AdapterOff, Anchor, FrozenCopies, exchanged
from memtrain.models.base import DiffusionModel
from memtrain.models.kohya_flux import without_name
from memtrain.models.lora_files import ADAPTER, FORMATS, write_lora
from memtrain.models.quantized import check_kind, compute_in

KINDS = ("attention", "linear")  # of layers that adapter.target_modules may name


class Adapter:
    """What a run trains of a model; this one, `adapter=none`, leaves it all weights of the networks that it trains."""

    def __init__(self) -> None:
        self.base: dict[str, str] = {}  # a hash of each network's weights, which an adapter is for; none: for any

    def check_quantization(self, kind: str | None) -> None:
        """Raises ValueError where this cannot be had of a model whose weights are in few bits."""
        if kind is not None:
            check_kind(kind)
            raise ValueError(
                f"model.quantization={kind} is of weights that stay as they are, and adapter=none trains them; say "
                "adapter=lora, or leave it out"
            )

    def attach(self, model: DiffusionModel, seed: int) -> None:
        """Make the model train what this is about; called once, before anything else sees the model."""
        self.insert(model, seed)

    def insert(self, model: DiffusionModel, seed: int) -> None:
        """The same, whatever weights the model has, or none."""

    def anchor(self, model: DiffusionModel) -> Anchor:
        """What gives the model back the weights that it has now; called after `attach`, before it learns."""
        return FrozenCopies(model)

    def prepare_frozen(self, dtype: torch.dtype) -> None:
        """Cast to the training precision what this has frozen."""

    def export(self, model: DiffusionModel, folder: Path, dtype: torch.dtype) -> None:
        """Write what was trained, for diffusers."""
        self.export_whole(model, folder, dtype)

    def export_whole(self, model: DiffusionModel, folder: Path, dtype: torch.dtype) -> None:
        """Write a whole pipeline that has in its weights what was trained."""
        model.export(folder, dtype)


class LowRank(Adapter):
    """Low-rank weights beside those of the layers, W + (alpha / rank) B A (LoRA, Hu et al. 2022): B begins at zero, so
    that the model is what it was; W stays as it is.

    Args:
        rank: of B A; the adapter's size goes with it.
        alpha: B A is weighed by alpha / rank; None: by 1.
        dropout: share of the layers' inputs that are zeroed before A, in forwards that are trained alone.
        target_modules: the layers that have an adapter: those of attention, all linear ones, or names, by their end.
        text_encoder: give the text encoder an adapter too.
        use_dora: train the norms of the layers' weights apart (DoRA, Liu et al. 2024).
        merge: export a whole pipeline, the adapter added to its weights, in place of the adapter.
        formats: in which the adapter is exported, of lora_files.FORMATS.
    """

    def __init__(
        self,
        rank: int,
        alpha: float | None,
        dropout: float,
        target_modules: str | Sequence[str],
        text_encoder: bool,
        use_dora: bool,
        merge: bool,
        formats: Sequence[str],
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"adapter.rank must be >= 1, got {rank}; use adapter=none to train all weights")
        if alpha is not None and not alpha > 0:
            raise ValueError(f"adapter.alpha must be > 0, got {alpha:g}; null takes the rank")
        if not 0 <= dropout < 1:
            raise ValueError(f"adapter.dropout must be in [0, 1), got {dropout:g}")
        if not formats or not set(formats) <= set(FORMATS):
            raise ValueError(
                f"adapter.formats must be some of {', '.join(FORMATS)}, got {', '.join(formats) or 'none'}"
            )
        if use_dora and not merge and ("kohya" in formats or text_encoder):
            said = "adapter.text_encoder=true" if text_encoder else "adapter.formats=kohya"
            raise ValueError(
                f"{said}: diffusers reads no norms of adapter=dora from there; leave it out, use adapter=lora, or say "
                "adapter.merge=true"
            )
        self.rank, self.alpha, self.dropout = rank, float(rank if alpha is None else alpha), dropout
        self.target_modules = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        self.text_encoder, self.use_dora = text_encoder, use_dora
        self.merge, self.formats = merge, tuple(formats)
        self._networks: dict[str, nn.Module] = {}  # those that have an adapter

    def check_quantization(self, kind: str | None) -> None:
        if kind is None:
            return
        check_kind(kind)
        if self.merge:
            raise ValueError(
                f"adapter.merge=true would add the adapter to weights in few bits (model.quantization={kind}); export "
                "it as it is, and merge it into the base in full precision"
            )

    def attach(self, model: DiffusionModel, seed: int) -> None:
        """Note whose adapter it will be, then insert it."""
        self._check(model)
        self.base = model.fingerprint(*model.network_names)
        self.insert(model, seed)

    def insert(self, model: DiffusionModel, seed: int) -> None:
        """Freeze the model and give its networks an adapter, which begins as a function of the seed.

        Raises:
            ValueError: the text encoder is trained already, `target_modules` match nothing, or a format is not for it.
        """
        self._check(model)
        model.text_encoder_is_trained = self.text_encoder
        names = (model.network_name, *(model.trainable_encoder_names if self.text_encoder else ()))
        networks = {name: getattr(model, name) for name in names}
        layers = targets(networks, self.target_modules)
        names_kohya = "kohya" in self.formats and not self.merge
        is_flux = isinstance(model.network, FluxTransformer2DModel)
        nameless = without_name(layers[model.network_name]) if names_kohya and is_flux else None
        if nameless is not None:
            raise ValueError(
                f"adapter.formats=kohya: diffusers reads no {nameless} from there; leave it out, or say "
                "adapter.target_modules=attention"
            )
        model.requires_grad_(False)
        for place, (name, network) in enumerate(networks.items()):
            self.give(network, layers[name], place_seed(seed, Stream.ADAPTER, 0, place))
        self._networks = networks
        model.freeze_unseen()
        model.train()

    def _check(self, model: DiffusionModel) -> None:
        if model.text_encoder_is_trained:
            raise ValueError(
                "model.train_text_encoder=true trains all weights of the text encoder, and an adapter leaves them as "
                "they are; say adapter.text_encoder=true for an adapter there, or adapter=none"
            )
        names_kohya = "kohya" in self.formats and not self.merge
        is_flux = isinstance(model.network, FluxTransformer2DModel)
        if names_kohya and model.network_name != "unet" and not is_flux:
            raise ValueError(
                f"adapter.formats=kohya is written for UNets and Flux.1, and this model has a {model.network_name} of "
                "another kind; leave it out"
            )
        if self.text_encoder:
            model.check_trains_text("adapter.text_encoder")

    def anchor(self, model: DiffusionModel) -> Anchor:
        return AdapterOff(list(self._networks))

    def give(self, network: nn.Module, layers: list[str], seed: int) -> None:
        """Give a network an adapter at these layers."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type] # peft takes any number
            lora_dropout=self.dropout,
            target_modules=layers,
            use_dora=self.use_dora,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, network, adapter_name=ADAPTER)
        if self.dropout:
            for layer in network.modules():
                if isinstance(layer, LoraLayer):
                    layer.lora_dropout[ADAPTER] = TrainedDropout(self.dropout)

    def prepare_frozen(self, dtype: torch.dtype) -> None:
        """Cast the weights that the adapter stands beside to the training precision, but those in few bits; its own
        stay float32."""
        for network in self._networks.values():
            for parameter in network.parameters():
                if not parameter.requires_grad and parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
            compute_in(network, dtype)

    def export(self, model: DiffusionModel, folder: Path, dtype: torch.dtype) -> None:
        """Write the adapter for `load_lora_weights`, or a whole pipeline that has it in its weights."""
        if self.merge:
            self.export_whole(model, folder, dtype)
        else:
            networks = {name: getattr(model, name) for name in self._networks}
            write_lora(type(model.pipeline()), networks, self.alpha / self.rank, folder, dtype, self.formats)

    def export_whole(self, model: DiffusionModel, folder: Path, dtype: torch.dtype) -> None:
        with exchanged(model, {name: merged(getattr(model, name)) for name in self._networks}):
            model.export(folder, dtype)


class TrainedDropout(nn.Dropout):
    """Dropout of forwards that are trained alone: what is scored, validated or drawn meanwhile has none."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(input, self.p, self.training and torch.is_grad_enabled())


def merged(network: nn.Module) -> nn.Module:
    """A copy in float32, on the CPU, without an adapter: its layers' weights hold it."""
    return _plain(network, merge=True)


def without_adapter(network: nn.Module) -> nn.Module:
    """A copy in float32, on the CPU, of what the adapter stands beside; of a network without one, the network."""
    return _plain(network, merge=False) if has_adapter(network) else network


def has_adapter(network: nn.Module) -> bool:
    """Whether low-rank weights stand beside some of its layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in network.modules())


def _plain(network: nn.Module, merge: bool) -> nn.Module:
    from diffusers.utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)

    # weights are copied to the CPU one by one: a whole copy beside the network may not fit where it is
    memo: dict[int, Any] = {
        id(one): nn.Parameter(copied(one), one.requires_grad)
        for one in network.parameters()
        if type(one) is nn.Parameter  # quantized ones know themselves how
    }
    memo |= {id(buffer): copied(buffer) for buffer in network.buffers()}
    network = nn.Module.to(copy.deepcopy(network, memo), "cpu", torch.float32)
    for layer in [module for module in network.modules() if isinstance(module, BaseTunerLayer) and merge]:
        layer.merge()
    recurse_remove_peft_layers(network)
    del network.peft_config
    return network


def targets(networks: dict[str, nn.Module], wanted: Sequence[str]) -> dict[str, list[str]]:
    """The names of the layers of each network that are to have an adapter.

    Args:
        wanted: `attention`, `linear`, or names of layers, or of their ends.

    Raises:
        ValueError: a network has no such layer, or one of the names is that of no layer.
    """
    found = {
        name: {one: [layer for layer in _layers(network) if _is_wanted(network, layer, one)] for one in wanted}
        for name, network in networks.items()
    }
    for name, network in networks.items():
        nowhere = [one for one in wanted if not any(layers[one] for layers in found.values())]
        if nowhere or not any(found[name].values()):
            found_ends = (re.search(r"[^.]+(\.\d+)*$", layer) for layer in _layers(network))
            ends = dict.fromkeys(end[0] for end in found_ends if end)
            raise ValueError(
                f"adapter.target_modules={','.join(nowhere or wanted) or '[]'} match no layer of the {name}; say "
                f"{', '.join(KINDS)}, or some of its layers: {', '.join(ends)}"
            )
    return {name: sorted({layer for layers in of.values() for layer in layers}) for name, of in found.items()}


def _layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def _is_wanted(network: nn.Module, layer: str, wanted: str) -> bool:
    if wanted not in KINDS:
        return layer == wanted or layer.endswith(f".{wanted}")
    if not isinstance(network.get_submodule(layer), nn.Linear):
        return False
    parts = layer.split(".")
    above = (network.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
    return wanted == "linear" or any("Attention" in type(module).__name__ for module in above)
