"""The words of a prompt, and the tokens that a tokenizer makes of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_WORD = re.compile(r"\w+(?:[-'’.]\w+)*|[^\w\s]+")
_WORD_END = "</w>"  # CLIP's mark of a token that ends a word


@dataclass(frozen=True)
class Word:
    """A word or mark of a prompt."""

    text: str
    start: int  # in the prompt, characters
    end: int
    tokens: tuple[int, ...]  # their positions in the padded prompt; none where it lies beyond the tokenizer's length


def words_of(prompt: str, pieces: Sequence[tuple[int, int, int]]) -> list[Word]:
    """The words of a prompt in their order; sub-word pieces belong to the word that they touch.

    Args:
        pieces: the model's `caption_pieces` of the prompt: place of a token, and the characters that it stands for.
    """
    return [
        Word(
            match.group(),
            match.start(),
            match.end(),
            tuple(place for place, start, end in pieces if start < match.end() and end > match.start()),
        )
        for match in _WORD.finditer(prompt)
    ]


class Span(Protocol):
    """Where a word lies in its prompt."""

    start: int
    end: int


def without(prompt: str, word: Span) -> str:
    """The prompt with this word dropped."""
    return " ".join(f"{prompt[: word.start]} {prompt[word.end :]}".split())


def replaced(prompt: str, word: Span, text: str) -> str:
    """The prompt with another text in this word's place."""
    return f"{prompt[: word.start]}{text}{prompt[word.end :]}"


def neighbours(word: str, tokenizer: PreTrainedTokenizerBase, table: Tensor, count: int) -> list[str]:
    """Words that lie nearest to this one among the text encoder's token embeddings, by cosine.

    Tokens of at least four letters that end a word are looked at; a word of several tokens is their mean.
    Words that share its first four letters (plurals, tenses) are left out.

    Args:
        table: (vocabulary, E) token embeddings.
    """
    vocabulary = {
        token.removesuffix(_WORD_END): place
        for token, place in tokenizer.get_vocab().items()
        if token.endswith(_WORD_END) and token.removesuffix(_WORD_END).isalpha() and len(token) >= len(_WORD_END) + 4
    }
    own = tokenizer(word, add_special_tokens=False).input_ids
    if not vocabulary or not own:
        return []
    table = torch.nn.functional.normalize(table.float(), dim=1)
    likeness = table[list(vocabulary.values())] @ table[own].mean(dim=0)  # (vocabulary,)
    texts = list(vocabulary)
    ranked = (texts[place] for place in likeness.argsort(descending=True).tolist())
    other = [text for text in ranked if text[:4] != word[:4].lower()]
    return other[:count]
