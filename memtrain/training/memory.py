"""What a run holds on a GPU, computed from configs on the meta device: no weights, no GPU, nothing of that size.

Weights, gradients, optimizer state and average are counted. Activations are what autograd saves in one forward of the
real network: each storage once, weights not among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from memtrain.core import losses
from memtrain.models.adapters import Adapter
from memtrain.models.base import DiffusionModel, trained_parameters
from memtrain.models.quantized import can_be_packed, packed_bytes
from memtrain.training.optimizers import OptimizerConfig

CARDS = (24, 40, 80)  # GiB
RESERVED = 2 * 2**30  # bytes of a card that are left free: driver's context, kernels' workspaces, fragmentation
_LOW_PRECISION = (functional.linear, functional.conv2d, torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul)
_FLOAT32 = (functional.layer_norm, functional.group_norm, functional.softmax, Tensor.softmax)


@dataclass(frozen=True)
class Memory:
    """What a run holds on each GPU, in bytes."""

    trained: int  # weights, not bytes, over all GPUs
    weights: dict[str, int]  # of each network that is there, an adapter's among them
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.gradients + self.optimizer + self.average + self.activations

    def fits(self, card: int) -> bool:
        """Whether a card of so many GiB has room for it, and for what is not counted."""
        return self.total + RESERVED <= card * 2**30


def measure(
    model: DiffusionModel,
    adapter: Adapter,
    optimizer: OptimizerConfig,
    *,
    resolution: int,
    batch_size: int,
    ema: bool,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    quantization: str | None = None,
    anchored: bool = False,
    shards: int = 1,
) -> Memory:
    """What training this model holds on one GPU.

    Args:
        model: on the meta device, as `make_trainable` left it.
        adapter: not yet attached.
        dtype: the training precision; what is trained is float32 whatever it is.
        gradient_checkpointing: as `make_trainable` was told.
        quantization: of the network's linear layers.
        anchored: the anchored magnitude is scored, for which trained networks are copied where they have no adapter.
        shards: ranks that trained networks, gradients, optimizer and average are cut over; 1: each has all.
    """
    adapter.insert(model, seed=0)
    model.prepare_frozen(dtype)
    adapter.prepare_frozen(dtype)
    trained = trained_parameters(model)
    cut = {id(network) for network in model.trained_modules()} if shards > 1 else set()
    weights = {
        name: _bytes(network.parameters()) // (shards if id(network) in cut else 1)
        for name, network in ((name, getattr(model, name)) for name in model.network_names)
    }
    if anchored and type(adapter) is Adapter:
        weights["frozen copies"] = sum(_bytes(network.parameters()) for network in model.trained_modules())
    if quantization is not None:
        weights[model.network_name] -= sum(
            layer.weight.numel() * layer.weight.element_size() - packed_bytes(layer.weight.shape, quantization)
            for layer in model.network.modules()
            if can_be_packed(layer, quantization) and not layer.weight.requires_grad
        )
    average = 0 if optimizer.averages or not ema else _bytes(trained)
    activations = saved_by_a_step(model, resolution, batch_size, dtype, gradient_checkpointing)
    return Memory(
        trained=sum(parameter.numel() for parameter in trained),
        weights=weights,
        gradients=_bytes(trained) // shards,
        optimizer=sum(optimizer.state_bytes(parameter.shape) for parameter in trained) // shards,
        average=average // shards,
        activations=activations,
    )


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- activations


def saved_by_a_step(
    model: DiffusionModel, resolution: int, batch_size: int, dtype: torch.dtype, gradient_checkpointing: bool
) -> int:
    """Bytes that the forward of B = `batch_size` rows leaves for its backward. With gradient checkpointing: what goes
    into each block, and all of the largest one, which is there when it is computed again."""
    device = next(model.network.parameters()).device
    noisy = torch.zeros(batch_size, *model.latent_shape(resolution, resolution), device=device)
    timesteps = torch.zeros(batch_size, dtype=torch.long, device=device)
    counted = Counted(model.parameters())
    with ExitStack() as stack:
        stack.enter_context(AsOnGpu(dtype))
        if gradient_checkpointing:
            model.network.enable_gradient_checkpointing(gradient_checkpointing_func=counted.block)
        stack.enter_context(counted.saving())
        conditioning = model.encode([""] * batch_size)  # saves something where text encoders are trained
        prediction = model.predict(noisy, timesteps, conditioning)
        losses.denoising_loss(prediction.float(), noisy)
    return counted.bytes + counted.largest_block


class Counted:
    """Counts storages that autograd saves, each once.

    Args:
        parameters: which are there anyway.
    """

    def __init__(self, parameters: Iterator[nn.Parameter]):
        self._own = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._saved: dict[int, torch.UntypedStorage] = {}
        self.largest_block = 0

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._saved.values())

    def saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Count what is saved while this context lasts."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def block(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """A block whose activations are computed again in backward: what goes into it is kept, and no more."""
        within = Counted(iter(()))
        within._own = self._own
        with within.saving():
            result = function(*arguments, **named)
        self.largest_block = max(self.largest_block, within.bytes)
        for argument in (*arguments, *named.values()):
            if isinstance(argument, Tensor):
                self._keep(argument)
        return result

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._saved[storage._cdata] = storage  # held, so that none other gets its number
        return tensor


class AsOnGpu(TorchFunctionMode):
    """Has functions save on the meta device what they save on a GPU: attention is fused, and with a lower precision
    casts are made where autocast makes them there, though not of all its functions: of those these networks use.

    A cast weight is kept for the whole step, as autocast does.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype != torch.float32:
            if func in _LOW_PRECISION or func is functional.scaled_dot_product_attention:
                args, kwargs = _cast(args, self.dtype), {key: _cast(value, self.dtype) for key, value in kwargs.items()}
            elif func in _FLOAT32:
                args, kwargs = _cast(args, torch.float32), {k: _cast(v, torch.float32) for k, v in kwargs.items()}
        if func is functional.scaled_dot_product_attention and (*args, *kwargs.values())[0].device.type == "meta":
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(one, dtype) for one in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **kwargs: Any
) -> Tensor:
    """It saves what goes in, what comes out, and a number a row; the meta device would take the attention matrix."""
    scale = kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, kwargs.get("is_causal", False), attn_mask=attn_mask, scale=scale
    )[0]
