"""memtrain: fine-tune text-to-image diffusion models without memorizing their training data."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["detect", "explain", "mitigate", "read_ledger", "text_conditional_magnitude"]

_ROOMS = {
    "detect": "memtrain.audit.detect.detection",
    "explain": "memtrain.audit.explain.explanation",
    "mitigate": "memtrain.audit.mitigate.mitigation",
    "read_ledger": "memtrain.data.ledger",
    "text_conditional_magnitude": "memtrain.core.scores",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch, diffusers or pyarrow when it is asked for."""
    if name in _ROOMS:
        return getattr(importlib.import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'memtrain' has no attribute {name!r}")
