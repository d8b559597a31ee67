"""What is trained: a task gives data, model and measurements, and the trainer knows no more of it than this."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .config import TrainConfig

Batch = tuple["Tensor", ...]
"""Tensors with an equal first dimension; the last one holds the targets, int64, negative where nothing is predicted."""

TASKS = {"text": "a decoder-only language model over bytes", "translate": "French to English, an encoder and a decoder"}


class Sampler(Protocol):
    """Training batches, a pure function of (data, seed, position)."""

    position: int
    """All there is to save."""

    def next(self) -> tuple[Batch, int]:
        """Rows of the next batch, and the number of predictions in all rows of it."""
        ...


class Task(Protocol):
    """A task with its data read."""

    @property
    def unit(self) -> str:
        """What the loss is per: "byte" or "token"."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the bits of a run depend on: texts, split, tokenizer."""
        ...

    def describe(self, config: TrainConfig) -> list[str]:
        """The data in a line or two."""
        ...

    def check(self, config: TrainConfig) -> None:
        """Raise BadInput for settings that the data or the model cannot serve."""
        ...

    def examples(self, config: TrainConfig) -> int:
        """Training examples of one epoch."""
        ...

    def model(self, config: TrainConfig) -> nn.Module:
        """New weights from torch's generator. Called with a batch it gives the mean cross-entropy in nats over its
        predictions; ``blocks`` lists its layers. Labels are smoothed in training mode only.
        """
        ...

    def sampler(self, config: TrainConfig, rows: slice) -> Sampler:
        """Batches of which only some rows are made."""
        ...

    def held_out(self, config: TrainConfig) -> Sequence[Batch]:
        """Validation batches, the same every time."""
        ...

    def measure(self, model: nn.Module, config: TrainConfig) -> dict[str, Any]:
        """What a finished run is measured by besides its loss; the model is in evaluation mode."""
        ...

    def report(self, measured: dict[str, Any]) -> list[str]:
        """What `measure` has found, in lines to print."""
        ...


def predictions(batch: Batch) -> int:
    """How many targets of a batch count."""
    return int((batch[-1] >= 0).sum())


def task_name(name: str) -> str:
    """`name` as it is written. BadInput with the closest known name otherwise."""
    if name in TASKS:
        return name
    close = difflib.get_close_matches(name, TASKS, n=1)
    hint = f": did you mean {close[0]}?" if close else ""
    raise BadInput(f"unknown task {name}{hint} (known: {', '.join(TASKS)})")


def load(name: str, text: Sequence[str] = (), tokenizer: str = "bytes", vocabulary_size: int = 0) -> Task:
    """Read the data of a task; BadInput when it cannot be."""
    if name == "translate":
        from .translate.task import load as load_translate

        return load_translate(tokenizer, vocabulary_size)
    from .text import load as load_text

    return load_text(text)
