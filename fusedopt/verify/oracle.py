"""The contract of an oracle: one independent step of a rule, written from its paper, in float64 or longdouble.

An oracle sees the values from which the step under test starts (already rounded to storage), so an error never piles
up over steps. It shares no code with `fusedopt/rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from .bounds import Bound
from .formats import SCALAR, DType


class Value(NamedTuple):
    """A new value and the largest term that went into it.

    addend: for each element the largest magnitude among the terms of every sum on the way, each with the weight at
    which it reaches the value. Errors are counted in units in the last place of it: where terms cancel, no
    arithmetic of that precision can do better. Infinite beside a finite value: that element is not judged.
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
    configurations: the rows to verify. bounds: name of a configuration → slot or ``"param"`` → bound.
    scalars: slots that hold one number for the parameter (0-dim), which is never rounded to the parameter's dtype.
    sparse: whether the rule takes only sparse gradients; it then gets them as such, with every row.
    complex: whether the rule takes complex parameters. stored: whether the step uses its new state as it is stored,
    which the option ``stored`` then tells it: slot → values. shapes: of the tensors to verify, where not every one
    will do.
    """

    rule: str
    defaults: Mapping[str, Any]
    step: Step
    configurations: tuple[Configuration, ...]
    bounds: Mapping[str, Mapping[str, Bound]]
    scalars: tuple[str, ...] = ()
    sparse: bool = False
    complex: bool = True
    stored: bool = False
    shapes: tuple[tuple[int, ...], ...] | None = None

    def dtype(self, slot: str, dtype: DType) -> DType:
        """How a slot is kept under a parameter dtype."""
        return SCALAR if slot in self.scalars else dtype

    def bound(self, configuration: Configuration, slot: str, dtype: DType) -> float:
        """Derived bound in ulps of the largest addend, in the slot's storage format under a parameter dtype."""
        return self.bounds[configuration.name][slot].of(self.dtype(slot, dtype))

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


def largest(*terms: np.ndarray | np.floating) -> np.ndarray:
    """Element-wise largest magnitude."""
    return reduce(np.maximum, (np.abs(term) for term in terms))


def square(x: Value) -> Value:
    """x², whose largest term is that of x squared."""
    return Value(x.exact**2, largest(x.exact, x.addend) ** 2)


def number(x: np.floating, real: type[np.floating]) -> Value:
    """A scalar slot's value, which is computed in one go."""
    return Value(np.asarray(real(x)), np.asarray(real(x)))


def average(beta: float | np.floating, old: np.ndarray, new: Value) -> Value:
    """β·old + (1 − β)·new."""
    real, b = old.dtype.type, np.longdouble(beta)
    kept, added = real(b) * old, real(1 - b)
    return Value(kept + added * new.exact, largest(kept, added * new.addend))


def debias(beta: float, t: int, real: type[np.floating]) -> np.floating:
    """1 − βᵗ; in longdouble, as the difference loses digits at small t."""
    return real(1 - np.longdouble(beta) ** t)


def share(x: Value) -> np.ndarray:
    """Size of the largest term of x in units of x: an error of that term's size is this much of x. 0 at 0 and ∞."""
    usable = (x.exact > 0) & np.isfinite(x.exact)
    return np.divide(x.addend, x.exact, out=np.zeros_like(x.exact), where=usable)


def coupled_gradient(h: Mapping[str, Any], p: np.ndarray, g: np.ndarray) -> Value:
    """Gradient to descend: −g if ``maximize``, plus the L2 term weight_decay·p, if any (0·NaN is none)."""
    g = -g if h["maximize"] else g
    if h["weight_decay"] == 0:
        return Value(g, np.abs(g))
    decay = p.dtype.type(h["weight_decay"]) * p
    total = g + decay
    return Value(total, largest(total, g, decay))


def norm(x: np.ndarray) -> np.floating:
    """L2 norm over all elements, 0 of none."""
    return np.sqrt(np.sum(x**2))
