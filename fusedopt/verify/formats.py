"""Floating-point formats in NumPy: one correct rounding into a format, and the unit in the last place there.

Everything is done on float64 or longdouble arrays, so that bfloat16 (which NumPy lacks) and float16 are rounded once
from the reference and never through float32 on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """A binary IEEE 754 format.

    digits: significant bits, the hidden one included. emin, emax: exponents e of the smallest and the largest normal
    numbers 1.f·2^e.
    """

    digits: int
    emin: int
    emax: int

    def ulp(self, x: np.ndarray) -> np.ndarray:
        """Distance of neighbouring numbers at the magnitude of x; the subnormal spacing at and near zero."""
        exponent = np.frexp(x)[1] - 1
        exponent = np.maximum(np.where(x == 0, self.emin, exponent), self.emin)
        return np.ldexp(np.ones_like(x), exponent - (self.digits - 1))

    def round(self, x: np.ndarray) -> np.ndarray:
        """x rounded once to nearest, ties to even, overflow to infinity; the result keeps x's NumPy type."""
        step = self.ulp(x)
        nearest = np.rint(x / step) * step
        largest = np.ldexp(x.dtype.type(2) - np.ldexp(x.dtype.type(1), 1 - self.digits), self.emax)
        return np.where(np.abs(nearest) > largest, np.copysign(x.dtype.type(np.inf), x), nearest)


@dataclass(frozen=True)
class DType:
    """A parameter dtype as it is verified.

    name: torch's. store: format of its elements (of a complex number's parts). compute: what a step is computed in.
    carrier: NumPy type that holds its values exactly, for exchange with torch. reference: the oracle's type, at
    least ten bits longer than ``compute``. gradients: decimal exponents of the smallest and largest gradient tried.
    parts: 2 for complex numbers, which are verified as pairs of reals, else 1.
    """

    name: str
    store: Format
    compute: Format
    carrier: type[np.floating]
    reference: type[np.floating]
    gradients: tuple[float, float]
    parts: int = 1

    @property
    def low(self) -> bool:
        """Whether storage is shorter than arithmetic, so that the reference is rounded once before comparing."""
        return self.store != self.compute


SINGLE = Format(digits=24, emin=-126, emax=127)
DOUBLE = Format(digits=53, emin=-1022, emax=1023)
BRAIN = Format(digits=8, emin=-126, emax=127)
HALF = Format(digits=11, emin=-14, emax=15)

DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("float32", SINGLE, SINGLE, np.float32, np.float64, (-12.0, 4.0)),
        DType("bfloat16", BRAIN, SINGLE, np.float32, np.float64, (-12.0, 4.0)),
        # float16 overflows at 65504: sums of all steps' g² (Adagrad) must stay below, so gradients end at 80.
        DType("float16", HALF, SINGLE, np.float32, np.float64, (-6.0, 1.9)),
        DType("float64", DOUBLE, DOUBLE, np.float64, np.longdouble, (-12.0, 4.0)),
        DType("complex64", SINGLE, SINGLE, np.float32, np.float64, (-12.0, 4.0), parts=2),
        DType("complex128", DOUBLE, DOUBLE, np.float64, np.longdouble, (-12.0, 4.0), parts=2),
    )
}
"""Parameter dtype (torch's name) → how it is verified."""


SCALAR = DType("float32", SINGLE, DOUBLE, np.float32, np.longdouble, (0.0, 0.0))
"""Scalar slots under every parameter dtype: computed in float64, kept in float32 (under torch's default dtype)."""


def has_reference(dtype: DType) -> bool:
    """Whether this machine's NumPy type for the oracle is at least ten bits longer than the arithmetic under test."""
    return np.finfo(dtype.reference).nmant + 1 >= dtype.compute.digits + 10
