"""The text: where it comes from, how it is split, and which part of it is batch number k."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import BadInput

VALIDATION_SHARE = 10  # the last tenth of every file is held out
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """Byte tokens of the training and the validation part, and the SHA-256 of both."""

    train: np.ndarray
    validation: np.ndarray
    digest: str


def standard_library() -> list[Path]:
    """Python's own source files on this machine, without its tests and without installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts))
    return sorted(path for path in files if path.stat().st_size > 0)


def load_text(files: Sequence[str]) -> Text:
    """Read `files` (bytes, in the given order), or the standard library's sources when there are none."""
    train, validation = [], []
    for path in [Path(name) for name in files] or standard_library():
        content = _read(path)
        cut = len(content) - len(content) // VALIDATION_SHARE
        train.append(content[:cut])
        validation.append(content[cut:])
    parts = b"".join(train), b"".join(validation)
    if not parts[0]:
        raise BadInput("Python's standard library has no source files here: name a text with --text FILE")
    digest = hashlib.sha256(len(parts[0]).to_bytes(8, "little") + parts[0] + parts[1]).hexdigest()
    return Text(np.frombuffer(parts[0], np.uint8), np.frombuffer(parts[1], np.uint8), digest)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"text file {path} does not exist") from None
    except IsADirectoryError:
        raise BadInput(f"text {path} is a folder: name its files") from None
    except OSError as error:
        raise BadInput(f"cannot read text file {path}: {error.strerror}") from None
    if not content:
        raise BadInput(f"text file {path} is empty")
    return content


def check_length(text: Text, batch_size: int, seq_len: int) -> None:
    """Refuse a text that cannot fill one training batch or one validation window."""
    needed = batch_size * seq_len + 1
    if len(text.train) < needed:
        raise BadInput(
            f"the text has {len(text.train)} training bytes, a batch of {batch_size} x {seq_len} needs {needed}: "
            "use a longer text or a smaller --batch-size or --max-seq-len"
        )
    if len(text.validation) <= seq_len:
        raise BadInput(
            f"the held-out tenth of the text has {len(text.validation)} bytes, --max-seq-len {seq_len} needs "
            f"{seq_len + 1}: use a longer text or a smaller --max-seq-len"
        )


def windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (the inputs shifted by one), each (len(starts), seq_len) int64."""
    block = torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)]).long()
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def windows_per_epoch(tokens: np.ndarray, seq_len: int) -> int:
    """How many windows an epoch visits: from any offset, without one that would leave the text."""
    return max(1, (len(tokens) - 1) // seq_len - 1)


class Sampler:
    """Training batches: each epoch visits non-overlapping windows once, in a random order, from a random offset.

    A batch is a pure function of (text, seed, position), so `position`, the number of windows drawn, is all there
    is to save. With `rows`, `next` gives these rows of the batch alone, and goes on as far.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, seed: int, rows: slice = slice(None)) -> None:
        self.tokens, self.batch_size, self.seq_len, self.seed, self.rows = tokens, batch_size, seq_len, seed, rows
        self.per_epoch = windows_per_epoch(tokens, seq_len)
        self.position = 0
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def next(self) -> tuple[tuple[Tensor, Tensor], int]:
        """The next batch of inputs and targets, each (number of rows, seq_len), and the bytes that all rows predict."""
        starts = [self._start(self.position + i) for i in range(self.batch_size)]
        self.position += self.batch_size
        batch = windows(self.tokens, np.array(starts[self.rows], np.int64), self.seq_len)
        return batch, self.batch_size * self.seq_len

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            room = len(self.tokens) - self.per_epoch * self.seq_len  # offsets that keep the last window inside
            offset = generator.integers(min(self.seq_len, room))
            self._epoch, self._starts = epoch, offset + self.seq_len * generator.permutation(self.per_epoch)
        return int(self._starts[index])


def validation_batches(tokens: np.ndarray, batch_size: int, seq_len: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """`count` batches (fewer when the text is short) of windows spread evenly over the validation text."""
    available = (len(tokens) - 1) // seq_len
    picked = np.linspace(0, available - 1, min(available, batch_size * count)).astype(np.int64)
    starts = picked * seq_len
    return [windows(tokens, starts[i : i + batch_size], seq_len) for i in range(0, len(starts), batch_size)]
