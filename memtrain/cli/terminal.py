"""What reaches the terminal, of memtrain and of the libraries it uses."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from memtrain.data.escaping import PrintableFormatter


def quiet() -> None:
    """Say what memtrain has to say; keep the libraries' advice and loading bars off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where it could be faster; imported by diffusers
    logging.getLogger("memtrain").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch|wandb)\b")
