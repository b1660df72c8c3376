"""Training-time mitigations from the literature that change captions or their embeddings.

After Somepalli et al., *Understanding and Mitigating Copying in Diffusion Models*, NeurIPS 2023. The defaults
in conf/method are those of the authors' code (github.com/somepago/DCR). Their "multiple captions" is a matter
of the data: `method=several_captions`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memtrain.models.base import DiffusionModel


class Method:
    """`method=none`: captions and embeddings as they are. Subclass it and override one of the two.

    A row's generator is a function of (seed, step, place), so that what it gives does not depend on ranks.
    """

    rewrites = False  # True: `captions` changes something, so cached embeddings are of no use

    def captions(
        self, captions: list[str], generators: list[np.random.Generator], model: DiffusionModel
    ) -> list[str]:
        """The captions to train on. Empty ones stay empty."""
        return captions

    def embeddings(self, hidden: Tensor, captioned: Tensor, generators: list[np.random.Generator]) -> Tensor:
        """(B, L, D) encoder_hidden_states to train with. Rows that are not `captioned` (B,) stay the same."""
        return hidden


class EmbeddingNoise(Method):
    """`method=embedding_noise`: Gaussian noise on the text embedding, all of its positions.

    Args:
        std: standard deviation of the noise.
    """

    def __init__(self, std: float):
        if not std > 0:
            raise ValueError(
                f"method.std must be > 0, got {std:g}; use method=none to leave embeddings alone"
            )
        self.std = std

    def embeddings(self, hidden: Tensor, captioned: Tensor, generators: list[np.random.Generator]) -> Tensor:
        shape = hidden.shape[1:]
        noise = torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))
        return torch.where(captioned[:, None, None], hidden + self.std * noise.to(hidden), hidden)


class CaptionRewriting(Method, ABC):
    """Rewrites a share of the captions, each visit anew.

    Args:
        probability: that a caption is rewritten at a visit.
        count: words that are put in.
    """

    rewrites = True

    def __init__(self, probability: float, count: int):
        if not 0 < probability <= 1:
            raise ValueError(
                f"method.probability must be in (0, 1], got {probability:g}; use method=none for never"
            )
        if count < 1:
            raise ValueError(f"method.count must be >= 1, got {count}")
        self.probability, self.count = probability, count

    def captions(
        self, captions: list[str], generators: list[np.random.Generator], model: DiffusionModel
    ) -> list[str]:
        rewritten = []
        for caption, generator in zip(captions, generators, strict=True):
            words = caption.split()
            if words and generator.random() < self.probability:
                caption = " ".join(self.rewrite(words, generator, model.tokenizer))
            rewritten.append(caption)
        return rewritten

    @abstractmethod
    def rewrite(self, words: list[str], generator: np.random.Generator, tokenizer: Any) -> list[str]:
        """Other words for a caption of at least one."""


class RandomTokensAdded(CaptionRewriting):
    """`method=random_tokens_added`: `count` random tokens, decoded, each at a random place in the caption."""

    def rewrite(self, words: list[str], generator: np.random.Generator, tokenizer: Any) -> list[str]:
        return insert_words(words, draw_words(self.count, generator, tokenizer), generator, tokenizer)


class RandomTokensReplaced(CaptionRewriting):
    """`method=random_tokens_replaced`: random tokens, decoded, in place of `count` words of the caption."""

    def rewrite(self, words: list[str], generator: np.random.Generator, tokenizer: Any) -> list[str]:
        drawn = draw_words(self.count, generator, tokenizer)
        seen = max(
            1, num_words_within(words, window(tokenizer) - num_tokens(drawn, tokenizer).sum(), tokenizer)
        )
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


# ---- words and the tokens that they become


@lru_cache(maxsize=1)
def vocabulary(tokenizer: Any) -> list[str]:
    """What single tokens say, without special tokens, spaces and fragments of a character."""
    special = set(tokenizer.all_special_ids)
    decoded = tokenizer.batch_decode([[token] for token in range(len(tokenizer)) if token not in special])
    return [word for word in map(str.strip, decoded) if word and "\N{REPLACEMENT CHARACTER}" not in word]


def draw_words(count: int, generator: np.random.Generator, tokenizer: Any) -> list[str]:
    words = vocabulary(tokenizer)
    return [words[number] for number in generator.integers(len(words), size=count).tolist()]


def window(tokenizer: Any) -> int:
    """Tokens of a caption that the model sees, without start and end."""
    return tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()


def num_tokens(words: list[str], tokenizer: Any) -> np.ndarray:
    """Of each word. (len(words),), none more than the window"""
    ids = tokenizer(words, add_special_tokens=False, truncation=True, max_length=window(tokenizer)).input_ids
    return np.array([len(tokens) for tokens in ids])


def num_words_within(words: list[str], room: int, tokenizer: Any) -> int:
    """How many of the first words fit into `room` tokens."""
    return int((num_tokens(words, tokenizer).cumsum() <= room).sum())


def insert_words(
    words: list[str], added: list[str], generator: np.random.Generator, tokenizer: Any
) -> list[str]:
    """The words with `added` at random places, all of them before the window ends."""
    room = window(tokenizer) - num_tokens(added, tokenizer).sum()
    gaps = num_words_within(words, room, tokenizer) + 1  # before the first word, after the first, …
    places = generator.integers(gaps, size=len(added)).tolist()
    rows = [*enumerate(words, start=1), *zip(places, added, strict=True)]  # word n stands before gap n
    return [word for _, word in sorted(rows, key=lambda row: row[0])]
