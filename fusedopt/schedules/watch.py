"""The learning rate of a running job, changed by hand: a small text file that is looked at in every step.

The last line of the file counts; blank lines and what follows a # do not:

    0.0003   this learning rate from now on
    x0.5     half of what the schedule says
             nothing, or no file: what the schedule says
"""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from .schedule import in_proportion, initial_lrs, set_lr

LARGEST = 65536
"""Bytes of a file that is read; a larger one is a mistake."""


class Steps(Protocol):
    """A schedule of this package or of torch."""

    def step(self, *args: Any, **kwargs: Any) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


def last_line(text: str) -> str:
    """What counts of a file's text; "" for nothing."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "")


def parse(entry: str) -> tuple[bool, float]:
    """Whether the entry multiplies the schedule, and its number. ValueError: it is no entry."""
    multiplies = entry.startswith("x")
    try:
        number = float(entry.removeprefix("x"))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"{entry[:80]!r} is no learning rate")
    return multiplies, number


class Watched:
    """A schedule, of this package or of torch, that the file at `path` can overrule. Used like the schedule itself.

    A learning rate in the file is that of the groups with the largest initial lr; the others follow in proportion.
    What torch's schedulers compute from is always their own lr, never the file's. agree: on several ranks, called by
    each at every step with what its file says, returns what all go by, such as the first rank's.
    """

    def __init__(
        self,
        schedule: Steps,
        optimizer: Optimizer,
        path: str | os.PathLike[str],
        agree: Callable[[str], str] = lambda entry: entry,
    ) -> None:
        self.schedule, self.optimizer, self.path, self._agree = schedule, optimizer, Path(path), agree
        self.entry = ""  # what overrules the schedule
        self._own = ""  # what this process's file says
        self._seen: object = None
        self._initial = initial_lrs(optimizer)
        self._scheduled = self._present()
        with self._as_scheduled():
            self._look()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the schedule, with its arguments, and look at the file."""
        with self._as_scheduled():
            self.schedule.step(*args, **kwargs)
            self._look()

    def validated(self, loss: float) -> None:
        """Tell a schedule of this package the loss of a validation."""
        with self._as_scheduled():
            getattr(self.schedule, "validated", lambda loss: None)(loss)

    def get_last_lr(self) -> list[float | Tensor]:
        """The lr of each group as the next step will use it."""
        return self._present()

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state, its learning rates, and what overrules them."""
        return {"schedule": self.schedule.state_dict(), "scheduled": self._scheduled, "entry": self.entry}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state`, or one of the schedule alone, was taken; the file is read again at the next step."""
        with self._as_scheduled():
            if "entry" not in state:
                self.schedule.load_state_dict(dict(state))
                return
            self.schedule.load_state_dict(state["schedule"])
            for group, lr in zip(self.optimizer.param_groups, state["scheduled"], strict=True):
                set_lr(group, lr)
            self.entry = self._own = state["entry"]
            self._seen = None

    @contextmanager
    def _as_scheduled(self) -> Iterator[None]:
        """Inside, groups have the schedule's learning rates; after it what the entry makes of them."""
        if self.entry:
            for group, lr in zip(self.optimizer.param_groups, self._scheduled, strict=True):
                set_lr(group, lr)
        try:
            yield
        finally:
            self._scheduled = self._present()
            if self.entry:
                multiplies, number = parse(self.entry)
                fixed = in_proportion(self._initial, number)
                for group, lr, own in zip(self.optimizer.param_groups, self._scheduled, fixed, strict=True):
                    set_lr(group, lr * number if multiplies else own)

    def _present(self) -> list[float | Tensor]:
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        return [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]

    def _look(self) -> None:
        """Read the file if it is not as it was at the last look. What cannot be read is reported once, and changes
        nothing.
        """
        try:
            status = self.path.stat()
            seen: object = status.st_ino, status.st_size, status.st_mtime_ns
        except OSError as error:
            seen = error.errno
        if seen != self._seen:
            self._seen = seen
            try:
                self._own = self._read()
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                form = "write a learning rate such as 0.0003, a multiple of the schedule such as x0.5, or nothing"
                warnings.warn(f"{self.path}: {reason}: {form}; {self._own or 'the schedule'} stays", stacklevel=4)
        self.entry = self._agree(self._own)

    def _read(self) -> str:
        """The file's entry. OSError or ValueError: it has none that can be read."""
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
                raise ValueError("not a small text file")
            entry = last_line(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return ""
        except UnicodeDecodeError:
            raise ValueError("not a text file") from None
        if entry:
            parse(entry)
        return entry
