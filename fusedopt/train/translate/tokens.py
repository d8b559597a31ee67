"""Tokenizers, for both languages together: bytes, or pieces of words learnt by byte-pair encoding.

Ids below SPECIALS are marks that no text contains: padding, start and end of a sentence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import BadInput

if TYPE_CHECKING:
    import tokenizers

PAD, START, END = 0, 1, 2
SPECIALS = 3
SMALLEST = SPECIALS + 256


class Tokenizer(Protocol):
    """`decode` undoes `encode` exactly, for every text. `size`: ids are below it. `digest`: of what it has learnt."""

    @property
    def size(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without marks."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without marks; what is not UTF-8 becomes U+FFFD."""
        ...


@dataclass(frozen=True)
class Bytes:
    """A token for each byte of UTF-8."""

    size = SMALLEST
    digest = "bytes"

    def encode(self, text: str) -> list[int]:
        return [SPECIALS + byte for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - SPECIALS for i in ids).decode(errors="replace")


@dataclass(frozen=True)
class Pieces:
    """A token for each piece of a word. All bytes are pieces, so that there is no unknown text."""

    learnt: tokenizers.Tokenizer

    @property
    def size(self) -> int:
        return SPECIALS + self.learnt.get_vocab_size()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.learnt.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [SPECIALS + i for i in self.learnt.encode(text).ids]

    def decode(self, ids: Iterable[int]) -> str:
        return self.learnt.decode([i - SPECIALS for i in ids])


def byte_pairs(texts: Iterable[str], size: int) -> Pieces:
    """Learn pieces from `texts`: `size` ids with the marks. Sennrich, Haddow, Birch 2016, arXiv:1508.07909.

    Raises:
        BadInput: fewer than all bytes, or more than occur twice.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if size < SMALLEST:
        raise BadInput(f"--vocabulary-size must be at least {SMALLEST} (all bytes and {SPECIALS} marks), not {size}")
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - SPECIALS,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learnt.train_from_iterator(texts, trainer)
    pieces = Pieces(learnt)
    if pieces.size < size:
        raise BadInput(f"--vocabulary-size {size}: the training pairs yield {pieces.size}, at most that many")
    return pieces


def make(name: str, vocabulary_size: int, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer `name`: "bytes", or "bpe", which learns from `texts`. BadInput for other names."""
    if name == "bytes":
        return Bytes()
    if name == "bpe":
        return byte_pairs(texts, vocabulary_size)
    raise BadInput(f"unknown tokenizer {name} (known: bytes, bpe)")
