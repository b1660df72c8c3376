"""What torch allocates, counted: the same on every machine, which resident memory is not."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Adds up the bytes of all storages that are made within, temporary ones too: a bound of the peak."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((arguments, options)) if torch.is_tensor(t)}
        found = function(*arguments, **(options or {}))
        for storage in {t.untyped_storage() for t in tree_leaves(found) if torch.is_tensor(t)}:
            if storage.data_ptr() not in given:
                self.bytes += storage.nbytes()
        return found
