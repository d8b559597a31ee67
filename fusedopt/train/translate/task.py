"""The task: corpus, tokenizer, model and scores behind the interface that every task has (`train.task`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import BadInput
from . import batches, corpus, tokens
from .corpus import Corpus, Pair
from .decode import translate
from .measure import measure, report
from .model import Sizes, Translator

if TYPE_CHECKING:
    from ..config import TrainConfig


Part = tuple[tuple[Pair, batches.Example], ...]


@dataclass(frozen=True)
class TranslateTask:
    """French to English. The parts: pairs with their ids, of any length."""

    corpus: Corpus
    tokenizer: tokens.Tokenizer
    train: Part
    held_out_part: Part
    unit = "token"

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.corpus.digest} {self.tokenizer.digest}".encode()).hexdigest()

    def describe(self, config: TrainConfig) -> list[str]:
        train, held_out = self._examples(config)
        left_out = len(self.train) + len(self.held_out_part) - len(train) - len(held_out)
        count = sum(len(example.target) + 1 for example in train)
        longer = f", without {left_out} longer than {config.max_seq_len} tokens" if left_out else ""
        return [
            f"corpus: French catalogues of {' and '.join(self.corpus.versions)}: {len(train)} training + "
            f"{len(held_out)} held-out pairs{longer}",
            f"tokens: {config.tokenizer}, a vocabulary of {self.tokenizer.size}; {count} to predict in an epoch",
        ]

    def check(self, config: TrainConfig) -> None:
        train, held_out = self._examples(config)
        if not train or not held_out:
            raise BadInput(f"--max-seq-len {config.max_seq_len} leaves no pairs: all have more tokens")
        if config.batch_size > len(train):
            raise BadInput(
                f"--batch-size {config.batch_size} is more than the {len(train)} training pairs of at most "
                f"--max-seq-len {config.max_seq_len} tokens: use a smaller one"
            )

    def examples(self, config: TrainConfig) -> int:
        return len(self._examples(config)[0])

    def model(self, config: TrainConfig) -> nn.Module:
        layers = config.hidden_size, config.num_layers, config.num_heads
        return Translator(
            Sizes(self.tokenizer.size, *layers, config.max_seq_len, config.dropout, config.label_smoothing)
        )

    def sampler(self, config: TrainConfig, rows: slice) -> batches.Sampler:
        return batches.Sampler(self._examples(config)[0], config.batch_size, config.seed, rows)

    def held_out(self, config: TrainConfig) -> Sequence[batches.Batch]:
        return batches.in_batches(self._examples(config)[1], config.batch_size, config.val_batches)

    def measure(self, model: nn.Module, config: TrainConfig) -> dict[str, Any]:
        """Scores and sample translations: see `measure.measure`."""
        assert isinstance(model, Translator)

        def by_model(texts: list[str]) -> list[str]:
            sources = [self.tokenizer.encode(text) for text in texts]
            return [self.tokenizer.decode(ids) for ids in translate(model, sources, config.max_seq_len)]

        train, held_out = ([pair for pair, _ in part] for part in self._parts(config))
        return measure(by_model, train, held_out)

    def report(self, measured: dict[str, Any]) -> list[str]:
        return report(measured)

    def _parts(self, config: TrainConfig) -> list[Part]:
        """Training and held-out part without what is too long."""
        parts = self.train, self.held_out_part
        return [tuple(item for item in part if item[1].length <= config.max_seq_len) for part in parts]

    def _examples(self, config: TrainConfig) -> list[list[batches.Example]]:
        return [[example for _, example in part] for part in self._parts(config)]


@cache
def load(tokenizer: str, vocabulary_size: int) -> TranslateTask:
    """Read the corpus and learn the tokenizer from its training part. BadInput where that cannot be."""
    read = corpus.load()
    learnt = tokens.make(tokenizer, vocabulary_size, (text for pair in read.train for text in pair))

    def encoded(pairs: Sequence[Pair]) -> Part:
        return tuple((pair, batches.Example(*map(learnt.encode, pair))) for pair in pairs)

    return TranslateTask(read, learnt, encoded(read.train), encoded(read.held_out))
