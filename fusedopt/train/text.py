"""Task `text`: the next byte of Python's standard library, or of the user's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from . import data
from .config import TrainConfig
from .model import Transformer
from .task import Batch


@dataclass(frozen=True)
class TextTask:
    """A decoder-only Transformer over bytes."""

    text: data.Text
    unit = "byte"

    @property
    def digest(self) -> str:
        return self.text.digest

    def describe(self, config: TrainConfig) -> list[str]:
        source = "your files" if config.text else "Python's standard library"
        sizes = f"{len(self.text.train) / 1e6:.2f} MB training + {len(self.text.validation) / 1e6:.2f} MB validation"
        return [f"text: {source}, {sizes}"]

    def check(self, config: TrainConfig) -> None:
        data.check_length(self.text, config.batch_size, config.max_seq_len)

    def examples(self, config: TrainConfig) -> int:
        return data.windows_per_epoch(self.text.train, config.max_seq_len)

    def model(self, config: TrainConfig) -> nn.Module:
        sizes = config.hidden_size, config.num_layers, config.num_heads, config.max_seq_len
        return Transformer(*sizes, config.dropout, config.label_smoothing)

    def sampler(self, config: TrainConfig, rows: slice) -> data.Sampler:
        return data.Sampler(self.text.train, config.batch_size, config.max_seq_len, config.seed, rows)

    def held_out(self, config: TrainConfig) -> Sequence[Batch]:
        size, length = config.batch_size, config.max_seq_len
        return data.validation_batches(self.text.validation, size, length, config.val_batches)

    def measure(self, model: nn.Module, config: TrainConfig) -> dict[str, Any]:
        return {}

    def report(self, measured: dict[str, Any]) -> list[str]:
        return []


def load(files: Sequence[str]) -> TextTask:
    """BadInput for files that cannot be read."""
    return TextTask(data.load_text(files)) if files else _default()


@cache
def _default() -> TextTask:
    """Python's own sources, which studies of many runs would read again and again."""
    return TextTask(data.load_text(()))
