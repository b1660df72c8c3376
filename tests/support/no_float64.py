"""A device without float64, as Apple's is: its tensors lie on the CPU and say otherwise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("mps")


class OnDevice(Tensor):
    """A tensor that says it is on the device."""


class NoFloat64(TorchFunctionMode):
    """What is computed of tensors on the device is there too; TypeError, as on the real one, where it is float64."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        moved = {"cpu": "cpu", "to": next((a for a in arguments[1:] if isinstance(a, (str, torch.device))), None)}
        to = options.get("device") or moved.get(getattr(function, "__name__", ""))
        there = torch.device(to) == DEVICE if to else any(issubclass(kind, OnDevice) for kind in types)
        if function == Tensor.device.__get__:
            return DEVICE if there else function(*arguments)
        if to and there:
            options["device"] = "cpu"
            arguments = tuple(a for a in arguments if not isinstance(a, (str, torch.device)))
        arguments, options = tree_map_only(OnDevice, lambda t: t.as_subclass(Tensor), (arguments, options))
        found = function(*arguments, **options)
        return tree_map_only(Tensor, _on_device, found) if there else found


def _on_device(tensor: Tensor) -> OnDevice:
    if tensor.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return tensor.as_subclass(OnDevice)
