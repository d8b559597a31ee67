"""What is wrong with a schedule, in one line, before anything is made."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .names import NAMES, SCHEDULES, Run, is_number, is_whole

NOTHING: Mapping[str, Any] = {}


def closest(word: str, known: Iterable[str]) -> str:
    """ ": did you mean …? " or nothing, and all that is known: the end of a message about an unknown name."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f": did you mean {close[0]}?" if close else "") + f" (known: {', '.join(known) or 'none'})"


def check(
    name: str,
    steps: int,
    warmup_steps: int = 0,
    lr: float = 1.0,
    min_lr: float = 0.0,
    epoch_steps: float = 1.0,
    arguments: Mapping[str, Any] = NOTHING,
) -> None:
    """Raise ValueError, of one line, for a schedule that is impossible."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name}{closest(str(name), NAMES)}")
    for label, value, low in (("steps", steps, 1), ("warmup_steps", warmup_steps, 0)):
        if not is_whole(value) or value < low:
            raise ValueError(f"{label} must be a whole number of at least {low}, not {value!r}")
    for label, value in (("lr", lr), ("min_lr", min_lr)):
        if not is_number(value) or value < 0:
            raise ValueError(f"{label} must be a finite number of at least 0, not {value!r}")
    if not is_number(epoch_steps) or epoch_steps <= 0:
        raise ValueError(f"epoch_steps must be a number above 0, not {epoch_steps!r}")
    if warmup_steps >= steps:
        raise ValueError(f"warmup_steps {warmup_steps} must be less than steps {steps}")
    if min_lr > lr:
        raise ValueError(f"min_lr {min_lr} must not exceed lr {lr}")
    check_arguments(name, arguments)
    problem = SCHEDULES[name].problem(Run(steps, warmup_steps, lr, min_lr, epoch_steps), arguments)
    if problem:
        raise ValueError(f"schedule {name}: {problem}")


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for a name that the schedule does not take, or a value that it cannot be."""
    known = SCHEDULES[name].arguments
    for label, value in arguments.items():
        if label not in known:
            raise ValueError(f"schedule {name} takes no argument {label}{closest(str(label), known)}")
        if not known[label].valid(value):
            raise ValueError(f"schedule {name}: {label} must be {known[label].must}, not {value!r}")


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """`("step_size=100", "shape=cosine")` as arguments: a Python literal, else the text itself. ValueError."""
    arguments = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not (name and equals and text):
            raise ValueError(f"a schedule's argument is written NAME=VALUE, not {pair!r}")
        try:
            arguments[name.replace("-", "_")] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[name.replace("-", "_")] = text
    return arguments
