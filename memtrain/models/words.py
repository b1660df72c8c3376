"""Words and the tokens that they become."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np


@lru_cache(maxsize=1)
def vocabulary(tokenizer: Any) -> list[str]:
    """The words that single tokens are, without special tokens, spaces and fragments of a character."""
    special = set(tokenizer.all_special_ids)
    decoded = tokenizer.batch_decode([[token] for token in range(len(tokenizer)) if token not in special])
    return [word for word in map(str.strip, decoded) if word and "\N{REPLACEMENT CHARACTER}" not in word]


def draw_words(count: int, generator: np.random.Generator, tokenizer: Any) -> list[str]:
    """Words of single tokens, drawn at random; one may come twice."""
    words = vocabulary(tokenizer)
    return [words[number] for number in generator.integers(len(words), size=count).tolist()]


def window(tokenizer: Any) -> int:
    """Tokens of a caption that the model sees, without start and end."""
    return tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()


def num_tokens(words: list[str], tokenizer: Any) -> np.ndarray:
    """How many tokens each word has, none more than the window. (len(words),)"""
    ids = tokenizer(words, add_special_tokens=False, truncation=True, max_length=window(tokenizer)).input_ids
    return np.array([len(tokens) for tokens in ids])


def num_words_within(words: list[str], room: int, tokenizer: Any) -> int:
    """How many of the first words fit into `room` tokens."""
    return int((num_tokens(words, tokenizer).cumsum() <= room).sum())


def insert_words(words: list[str], added: list[str], generator: np.random.Generator, tokenizer: Any) -> list[str]:
    """The words with `added` at random places, all of them before the window ends."""
    room = window(tokenizer) - num_tokens(added, tokenizer).sum()
    gaps = num_words_within(words, room, tokenizer) + 1  # before the first word, after the first, …
    places = generator.integers(gaps, size=len(added)).tolist()
    rows = [*enumerate(words, start=1), *zip(places, added, strict=True)]  # word n stands before gap n
    return [word for _, word in sorted(rows, key=lambda row: row[0])]
