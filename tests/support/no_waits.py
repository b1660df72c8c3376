"""A device that notes whenever the host waits for it: its tensors lie on the CPU and say otherwise."""

from __future__ import annotations

import traceback

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.support.no_float64 import DEVICE, NoFloat64, OnDevice

_READ = ("cpu", "item", "tolist", "numpy", "nonzero", "unique", "masked_select", "equal", "__bool__", "__int__",
         "__float__", "__index__", "__contains__")  # fmt: skip


class NoWaits(NoFloat64):
    """Keeps in `waits` where the host read of the device, and where it sent there what it then waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        if _waits(name, arguments, options or {}):
            own = ("/memtrain/", "/tests/")  # of the frames of these, the last, this mode's left out
            frames = [f for f in traceback.extract_stack() if any(part in f.filename for part in own)]
            last = [frame for frame in frames if "/support/" not in frame.filename][-1]
            self.waits.append(f"{last.filename.rpartition('/')[2]}: {last.line}")
        return super().__torch_function__(function, types, arguments, options)


def _waits(name: str, arguments: tuple, options: dict) -> bool:
    there = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, OnDevice)]
    to = options.get("device") or next((a for a in arguments[1:] if isinstance(a, (str, torch.device))), None)
    if name == "to" and to is not None:
        same = bool(there) == (torch.device(to) == DEVICE)
        return not same and not (options.get("non_blocking") and not there)
    if name in ("tensor", "as_tensor") and to is not None and torch.device(to) == DEVICE:
        return True
    if name in ("__getitem__", "__setitem__") and there:  # how many rows a mask chooses is not known on the host
        return any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(arguments[1]))
    if name == "where" and len(arguments) == 1 and there:
        return True
    return bool(there) and name in _READ
