"""Training-time mitigations from the literature that change captions or their embeddings.

After Somepalli et al., *Understanding and Mitigating Copying in Diffusion Models*, NeurIPS 2023. The defaults
in conf/method are those of the authors' code (github.com/somepago/DCR).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memtrain.models.base import DiffusionModel
from memtrain.models.words import draw_words, insert_words, num_tokens, num_words_within, window


class Method:
    """`method=none`: captions and embeddings as they are. Subclass it and override one of the two.

    A row's generator is a function of (seed, step, place), so that what it gives does not depend on ranks.
    """

    rewrites = False  # True: `captions` changes something, so cached embeddings are of no use

    def captions(self, captions: list[str], generators: list[np.random.Generator], model: DiffusionModel) -> list[str]:
        """Captions to train on in place of these, one for each. Empty ones stay empty."""
        return captions

    def embeddings(self, hidden: Tensor, captioned: Tensor, generators: list[np.random.Generator]) -> Tensor:
        """Embeddings (B, L, D) to train with in place of `hidden`. Rows that are not `captioned` (B,) stay the same."""
        return hidden


class SeveralCaptions(Method):
    """`method=several_captions`: one of the sample's captions at each visit. `data.caption` names and draws them."""


class EmbeddingNoise(Method):
    """`method=embedding_noise`: Gaussian noise on the text embedding, all of its positions.

    Args:
        std: standard deviation of the noise.
    """

    def __init__(self, std: float):
        if not std > 0:
            raise ValueError(f"method.std must be > 0, got {std:g}; use method=none to leave embeddings alone")
        self.std = std

    def embeddings(self, hidden: Tensor, captioned: Tensor, generators: list[np.random.Generator]) -> Tensor:
        shape = hidden.shape[1:]
        noise = torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))
        return torch.where(captioned[:, None, None], hidden + self.std * noise.to(hidden), hidden)


class CaptionRewriting(Method, ABC):
    """A method that rewrites a share of the captions, at each visit anew; a subclass says how.

    Args:
        probability: that a caption is rewritten at a visit.
        count: words that are put in.
    """

    rewrites = True

    def __init__(self, probability: float, count: int):
        if not 0 < probability <= 1:
            raise ValueError(f"method.probability must be in (0, 1], got {probability:g}; use method=none for never")
        if count < 1:
            raise ValueError(f"method.count must be >= 1, got {count}")
        self.probability, self.count = probability, count

    def captions(self, captions: list[str], generators: list[np.random.Generator], model: DiffusionModel) -> list[str]:
        rewritten = []
        for caption, generator in zip(captions, generators, strict=True):
            words = caption.split()
            if words and generator.random() < self.probability:
                caption = " ".join(self.rewrite(words, generator, model.caption_tokenizer))
            rewritten.append(caption)
        return rewritten

    @abstractmethod
    def rewrite(self, words: list[str], generator: np.random.Generator, tokenizer: Any) -> list[str]:
        """The words to train on in place of a caption's, of which there is at least one."""


class RandomTokensAdded(CaptionRewriting):
    """`method=random_tokens_added`: `count` random tokens, decoded, each at a random place in the caption."""

    def rewrite(self, words: list[str], generator: np.random.Generator, tokenizer: Any) -> list[str]:
        return insert_words(words, draw_words(self.count, generator, tokenizer), generator, tokenizer)


class RandomTokensReplaced(CaptionRewriting):
    """`method=random_tokens_replaced`: random tokens, decoded, in place of `count` words of the caption."""

    def rewrite(self, words: list[str], generator: np.random.Generator, tokenizer: Any) -> list[str]:
        drawn = draw_words(self.count, generator, tokenizer)
        seen = max(1, num_words_within(words, window(tokenizer) - num_tokens(drawn, tokenizer).sum(), tokenizer))
        places = generator.permutation(seen)[: self.count]
        words = list(words)
        for place, word in zip(places.tolist(), drawn, strict=False):  # a short caption has fewer places
            words[place] = word
        return words


class WordsRepeated(CaptionRewriting):
    """`method=words_repeated`: `count` of the caption's words once more, each at a random place."""

    def rewrite(self, words: list[str], generator: np.random.Generator, tokenizer: Any) -> list[str]:
        seen = max(1, num_words_within(words, window(tokenizer), tokenizer))
        drawn = [words[place] for place in generator.integers(seen, size=self.count).tolist()]
        return insert_words(words, drawn, generator, tokenizer)


class RandomCaption(CaptionRewriting):
    """`method=random_caption`: `count` random tokens, decoded, instead of the caption."""

    def rewrite(self, words: list[str], generator: np.random.Generator, tokenizer: Any) -> list[str]:
        return draw_words(self.count, generator, tokenizer)
