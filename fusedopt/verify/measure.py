"""Errors against the oracle, and bit-for-bit comparison of two backends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .formats import DType
from .oracle import Value
from .problem import TIMES, Problem
from .subjects import Outcome

UNORDERED = ("float64", "complex128")
"""Dtypes whose norms are sums in their own precision, which no backend must add in the order of another."""


@dataclass
class Error:
    """Errors in ulps of the largest addend, over all elements seen so far.

    largest: maximum. count, squares: elements whose error is finite, and the sum of their squares. broken: elements
    that are infinite or NaN where the reference is finite, or the other way round.
    """

    largest: float = 0.0
    count: int = 0
    squares: float = 0.0
    broken: int = 0

    @property
    def rms(self) -> float:
        """Root of the mean square over finite errors; 0 if there are none."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def add(self, ulps: np.ndarray) -> None:
        """Take in the errors of some elements; NaN or infinite means broken."""
        finite = ulps[np.isfinite(ulps)]
        self.broken += ulps.size - finite.size
        self.count += finite.size
        self.squares += float(np.sum(finite.astype(np.float64) ** 2))
        self.largest = max(self.largest, float(np.max(finite, initial=0.0)))


def ulps(got: np.ndarray, expected: Value, dtype: DType) -> np.ndarray:
    """Error of each judged element in ulps of the largest addend, in the storage format; NaN if one side is finite.

    Storage shorter than arithmetic is compared with the reference rounded once, so a correct rounding counts 0.
    """
    reference = dtype.store.round(expected.exact) if dtype.low else expected.exact
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(got.astype(dtype.reference) - reference) / dtype.store.ulp(expected.addend)
    judged = ~np.isinf(expected.addend) | np.isinf(reference)
    same = (np.isinf(reference) & (got == reference)) | (np.isnan(reference) & np.isnan(got))
    return np.where(same, 0.0, error)[judged]


def measure(problem: Problem, outcome: Outcome, errors: dict[str, Error]) -> None:
    """Add a run's errors to ``errors``, one entry per slot."""
    for case, got in zip(problem.steps, outcome, strict=True):
        for slot, tensors in got.items():
            error = errors.setdefault(slot, Error())
            for tensor, expected in zip(tensors, case.expected, strict=True):
                error.add(ulps(tensor, expected[slot], problem.dtype_of(slot)))


@dataclass(frozen=True)
class Difference:
    """The first element at which two backends differ (of a complex tensor: of its pairs), and how many do."""

    seed: int
    t: int
    slot: str
    tensor: int
    element: int
    values: tuple[float, float]
    count: int

    def __str__(self) -> str:
        left, right = (f"{value.hex()} ({value!r})" for value in self.values)
        return (
            f"{self.count} elements differ; first: seed {self.seed}, step {self.t}, {self.slot} of tensor "
            f"{self.tensor}, element {self.element}: {left} and {right}"
        )


def first_difference(seed: int, left: Outcome, right: Outcome, times: Sequence[int] = TIMES) -> Difference | None:
    """Compare the bits of two runs over ``times`` (any NaN equals any NaN); None if all are equal."""
    first, count = None, 0
    for t, slot, tensor, a, b in _pairs(left, right, times):
        bits = f"u{a.dtype.itemsize}"
        differs = (a.view(bits) != b.view(bits)) & ~(np.isnan(a) & np.isnan(b))
        where = np.flatnonzero(differs)
        count += where.size
        if where.size and first is None:
            values = (float(a[where[0]]), float(b[where[0]]))
            first = (t, slot, tensor, int(where[0]), values)
    return Difference(seed, *first, count) if first else None


def _pairs(
    left: Outcome, right: Outcome, times: Sequence[int]
) -> Iterator[tuple[int, str, int, np.ndarray, np.ndarray]]:
    for t, a, b in zip(times, left, right, strict=True):
        for slot in a:
            for tensor, (x, y) in enumerate(zip(a[slot], b[slot], strict=True)):
                yield t, slot, tensor, x.ravel(), y.ravel()
