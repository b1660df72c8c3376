"""`trainer=fsdp`: weights, gradients, average and optimizer state, sharded over all ranks (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from memtrain.models.base import DiffusionModel

# What is gathered for its forward and backward, and let go again: of about one size, dozens in a network.
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer", "JointTransformerBlock")


class FullySharded(ModelParallelStrategy):
    """Lightning's FSDP2 with one set of shards over all ranks, and checkpoints of one file, as without sharding."""

    def __init__(self, process_group_backend: str | None = None):
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        # otherwise Lightning shards single tensors within a machine, which a UNet is not made for
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.model is not None
        check_numbering(Path(checkpoint_path), self.model)
        return super().load_checkpoint(checkpoint_path, weights_only)


def check_numbering(checkpoint: Path, module: nn.Module) -> None:
    """Raises ValueError where a checkpoint's optimizer numbers other weights than sharded ones are numbered: these are
    counted among all of the module's, frozen ones too, others among those that are trained."""
    trained = {number for number, parameter in enumerate(module.parameters()) if parameter.requires_grad}
    [optimizer] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["optimizer_states"]
    if not optimizer["state"].keys() <= trained:
        raise ValueError(
            f"{checkpoint} is of a run that was not sharded, and trainer=fsdp cannot read its optimizer, which knows "
            "an adapter's weights by other numbers; go on with trainer=ddp, or begin a new run"
        )


def trainer(strategy: str, **settings: Any) -> pl.Trainer:
    """Build the trainer of `trainer=fsdp`, whose config names the strategy and cannot hold it."""
    return pl.Trainer(strategy=FullySharded(), **settings)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network's blocks, then what is left of it."""
    for block in [module for module in network.modules() if type(module).__name__ in BLOCKS]:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def shard_trained(model: DiffusionModel, mesh: DeviceMesh) -> dict[str, nn.Module]:
    """Shard the networks of a model that are trained, in place.

    Returns:
        A copy without weights of each as it was, by the name that the model has for it: bones that `filled` makes a
        whole network of.
    """
    trained = {id(network) for network in model.trained_modules()}
    bones = {}
    for name, network in model.named_children():
        if id(network) in trained:
            bones[name] = without_weights(network)
            shard(network, mesh)
    return bones


def without_weights(network: nn.Module) -> nn.Module:
    """A copy of a network that is not yet sharded, with parameters that take no room."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in network.parameters()}
    return copy.deepcopy(network, empty)


def filled(empty: nn.Module, sharded: nn.Module, weights: Iterator[Tensor]) -> nn.Module:
    """A whole network on each rank, of bones, the next weights of these for those that are trained, and the others of
    the sharded network. All ranks call this together."""
    network = copy.deepcopy(empty)
    state = {
        name: whole((next(weights) if parameter.requires_grad else parameter).detach())
        for name, parameter in sharded.named_parameters()
    }
    network.load_state_dict(state, strict=False, assign=True)  # buffers are those of the copy
    return network.requires_grad_(False)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, whole, on each rank; any other as it is. All ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, where `like` is sharded."""
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
