"""Training-time mitigations from the literature that change captions or their embeddings."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from memtrain.models.base import DiffusionModel


class Method:
    """`method=none`: captions and embeddings as they are. Subclass it and override one of the two."""

    rewrites = False  # True: `captions` changes something, so cached embeddings are of no use

    def captions(self, captions: list[str], generators: list[np.random.Generator], model: DiffusionModel) -> list[str]:
        """The captions to train on; a generator for each row, a function of (seed, step, place). Empty stay empty."""
        return captions

    def embeddings(self, hidden: Tensor, generators: list[np.random.Generator]) -> Tensor:
        """(B, L, D) encoder_hidden_states to train with."""
        return hidden
