"""The contract of an oracle: one independent step of a rule, written from its paper, in float64 or longdouble.

An oracle sees the values from which the step under test starts (already rounded to storage), so an error never piles
up over steps. It shares no code with `fusedopt/rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Value(NamedTuple):
    """A new value and the largest term that went into it.

    addend: for each element the largest magnitude among the terms of every sum on the way, each with the weight at
    which it reaches the value. Errors are counted in units in the last place of it: where terms cancel, no
    arithmetic of that precision can do better.
    """

    exact: np.ndarray
    addend: np.ndarray


Step = Callable[[Mapping[str, Any], int, np.ndarray, np.ndarray, Mapping[str, np.ndarray]], dict[str, Value]]


@dataclass(frozen=True)
class Configuration:
    """A rule with options: one row of the report. options: keyword arguments of the torch.optim class."""

    rule: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.rule} ({self.name})"


@dataclass(frozen=True)
class Oracle:
    """Everything that `verify` knows of a rule.

    rule: its name in `fusedopt.rules.RULES`. defaults: torch.optim's defaults of every option that ``step`` reads.
    step: ``(options, t, p, g, state) → {"param": Value, slot: Value, …}``; t counts from 1 and includes this step;
    ``state`` is empty on the first step, and what is missing counts as a state that does not exist yet.
    configurations: the rows to verify.
    """

    rule: str
    defaults: Mapping[str, Any]
    step: Step
    configurations: tuple[Configuration, ...]

    def run(
        self,
        configuration: Configuration,
        t: int,
        p: np.ndarray,
        g: np.ndarray,
        state: Mapping[str, np.ndarray],
    ) -> dict[str, Value]:
        """One step of a configuration; the NumPy type of ``p`` decides the precision."""
        with np.errstate(divide="ignore", invalid="ignore", under="ignore"):
            return self.step({**self.defaults, **configuration.options}, t, p, g, state)


def largest(*terms: np.ndarray) -> np.ndarray:
    """Element-wise largest magnitude."""
    return np.maximum.reduce([np.abs(term) for term in terms])


def coupled_gradient(h: Mapping[str, Any], p: np.ndarray, g: np.ndarray) -> Value:
    """Gradient to descend: −g if ``maximize``, plus the L2 term weight_decay·p."""
    real = p.dtype.type
    g = -g if h["maximize"] else g
    decay = real(h["weight_decay"]) * p
    total = g + decay
    return Value(total, largest(total, g, decay))
