"""Batches of pairs: padded, and which pairs are batch number k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tokens import END, PAD, START

IGNORED = -100
"""The target of a position that predicts nothing."""
Batch = tuple[Tensor, Tensor, Tensor]
JITTER = 0.25


class Example(NamedTuple):
    """Ids of a sentence and of its translation, without marks."""

    source: list[int]
    target: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer side, with the one mark that each side has."""
        return 1 + max(len(self.source), len(self.target))


def collate(examples: Sequence[Example], rows: slice = slice(None)) -> Batch:
    """Some rows of a batch: source, what the decoder reads, what it is to predict; each (number of rows, time) int64.

    Rows are padded to the longest of all examples, so that ranks have equal shapes.
    """
    sides = (
        ([[*x.source, END] for x in examples], PAD),
        ([[START, *x.target] for x in examples], PAD),
        ([[*x.target, END] for x in examples], IGNORED),
    )
    source, inputs, targets = (pad(side, filler, rows) for side, filler in sides)
    return source, inputs, targets


def pad(lists: Sequence[list[int]], filler: int, rows: slice = slice(None)) -> Tensor:
    """Lists of ids as a matrix as wide as the longest of all of them; `rows` of it."""
    width = max(map(len, lists))
    return torch.tensor([ids + [filler] * (width - len(ids)) for ids in lists[rows]]).view(-1, width)


class Sampler:
    """Training batches: each epoch visits every pair once, pairs of similar length together, in a random order.

    A batch is a pure function of (examples, seed, position), so `position`, the number of pairs drawn, is all there
    is to save. With `rows`, `next` gives these rows of the batch alone, and goes on as far.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int, rows: slice = slice(None)) -> None:
        self.examples, self.batch_size, self.seed, self.rows = examples, batch_size, seed, rows
        self.position = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def next(self) -> tuple[Batch, int]:
        """Rows of the next batch, and the number of predictions in all rows of it."""
        batch = [self.examples[self._index(self.position + i)] for i in range(self.batch_size)]
        self.position += self.batch_size
        return collate(batch, self.rows), sum(len(example.target) + 1 for example in batch)

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.examples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._new_order(epoch)
        return int(self._order[place])

    def _new_order(self, epoch: int) -> np.ndarray:
        """Sorted by length times a random number, cut into batches, batches shuffled.

        A batch that begins in the last epoch or ends in the next is made of the shortest, which then waste least.
        """
        generator = np.random.default_rng([self.seed, epoch])
        count, size = len(self.examples), self.batch_size
        lengths = np.array([example.length for example in self.examples])
        order = np.argsort(lengths * generator.uniform(1 - JITTER, 1 + JITTER, count), kind="stable")
        begun = -epoch * count % size
        left = (count - begun) % size
        batches = order[begun + left :].reshape(-1, size)
        return np.concatenate((order[:begun], generator.permutation(batches).ravel(), order[begun : begun + left]))


def in_batches(examples: Sequence[Example], batch_size: int, count: int) -> list[Batch]:
    """`count` batches (fewer when there are few examples) spread evenly over the lengths."""
    ordered = sorted(examples, key=lambda example: example.length)
    picked = np.linspace(0, len(ordered) - 1, min(len(ordered), batch_size * count)).astype(int)
    chosen = [ordered[i] for i in picked]
    return [collate(chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]
