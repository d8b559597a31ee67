"""How numbers are stored, format by format, for verification alone: written from the formats' descriptions.

A format's numbers have ranks, in order. Stored bits give a rank, rank and scale give the number; its neighbours' say
how far from it the number that was rounded may lie: half the way if it was to nearest, all of it if at random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

GROUP = 64
"""Elements of a row that share a scale."""

TINY = 2.0**-100
"""Groups whose largest magnitude is below this are zeros."""

RANDOM_BITS = 2.0**-15
"""Random numbers are so fine: a number may be carried that much further than to its neighbour."""


class Reading(NamedTuple):
    """Stored numbers, float64. down, up: how far below and above each the number that was rounded may lie."""

    value: np.ndarray
    down: np.ndarray
    up: np.ndarray


def _reading(value: Callable[[np.ndarray], np.ndarray], rank: np.ndarray, random: bool) -> Reading:
    reach = 1 + RANDOM_BITS if random else 0.5
    here = value(rank)
    return Reading(here, reach * (here - value(rank - 1)), reach * (value(rank + 1) - here))


# ------------------------------------------------------------------------------------------- floating point and weights
def _bfloat16(size: np.ndarray) -> np.ndarray:
    return (size.astype(np.uint32) << 16).view(np.float32)


def _float24(size: np.ndarray) -> np.ndarray:
    """fp32 without its last 8 bits."""
    return (size.astype(np.uint32) << 8).view(np.float32)


FLOATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float32": lambda size: size.astype(np.uint32).view(np.float32),
    "bfloat16": _bfloat16,
    "float16": lambda size: size.astype(np.uint16).view(np.float16),
    "float24": _float24,
}
"""Name → numbers whose bits, without the sign, are given."""


def _rank(bits: np.ndarray, width: int) -> np.ndarray:
    """Of floating point numbers: their bits without the sign, negative for negative ones."""
    bits = bits.astype(np.int64)
    size = bits & ((1 << (width - 1)) - 1)
    return np.where(bits >> (width - 1), -size, size)


def _signed(numbers: Callable[[np.ndarray], np.ndarray], rank: np.ndarray) -> np.ndarray:
    return np.sign(rank) * numbers(np.abs(rank)).astype(np.float64)


def read_float(name: str, bits: np.ndarray, random: bool) -> Reading:
    """Numbers of an ordinary floating-point type, as unsigned bits."""
    return _reading(lambda rank: _signed(FLOATS[name], rank), _rank(bits, bits.dtype.itemsize * 8), random)


def _plain(dtype: str, param: np.ndarray, beside: np.ndarray, random: bool) -> Reading:
    return read_float(dtype, param, random)


def _master(dtype: str, param: np.ndarray, beside: np.ndarray, random: bool) -> Reading:
    return read_float("float32", beside, random)


def _kahan(dtype: str, param: np.ndarray, beside: np.ndarray, random: bool) -> Reading:
    """x = p + c, in fp32; p is x rounded, c what this has lost."""
    p = _signed(FLOATS[dtype], _rank(param, 16))

    def value(rank: np.ndarray) -> np.ndarray:
        return (p + _signed(FLOATS[dtype], rank)).astype(np.float32).astype(np.float64)

    return _reading(value, _rank(beside, 16), random)


def _joined(param: np.ndarray, low: np.ndarray, shift: int) -> np.ndarray:
    """x = bits⁻¹((weight << 16 | residual << shift) − 0x8000)."""
    both = param.astype(np.int64) << 16 | low.astype(np.int64) << shift
    return (both - 0x8000) & 0xFFFFFFFF


def _split16(dtype: str, param: np.ndarray, beside: np.ndarray, random: bool) -> Reading:
    return read_float("float32", _joined(param, beside, 0).astype(np.uint32), random)


def _split8(dtype: str, param: np.ndarray, beside: np.ndarray, random: bool) -> Reading:
    rank = _rank(_joined(param, beside, 8) >> 8, 24)
    return _reading(lambda rank: _signed(FLOATS["float24"], rank), rank, random)


class Weights(NamedTuple):
    """A weight format. key: of what stands beside the weight, None if nothing; bits: of that, 0: as the weight.

    read: (dtype of the weight, its bits, bits beside it, whether rounded at random) → numbers. dtypes: it is for.
    """

    key: str | None
    bits: int
    read: Callable[[str, np.ndarray, np.ndarray, bool], Reading]
    dtypes: tuple[str, ...] = ("bfloat16", "float16")


PLAIN = Weights(None, 0, _plain)
WEIGHTS = {
    "float32": Weights("master_param", 32, _master),
    "split16": Weights("param_residual", 16, _split16, ("bfloat16",)),
    "split8": Weights("param_residual", 8, _split8, ("bfloat16",)),
    "kahan": Weights("param_residual", 0, _kahan),
    "stochastic": PLAIN,
}
"""Value of ``master_weights`` → how it is kept."""


# --------------------------------------------------------------------------------------------------- quantised state
def _whole(rank: np.ndarray) -> np.ndarray:
    return rank.astype(np.float64)


def _float8(mantissa: int, bias: int) -> Callable[[np.ndarray], np.ndarray]:
    def numbers(size: np.ndarray) -> np.ndarray:
        exponent, fraction = size >> mantissa, size & ((1 << mantissa) - 1)
        whole = np.where(exponent == 0, fraction, fraction + (1 << mantissa)).astype(np.float64)
        return np.ldexp(whole, np.maximum(exponent, 1) - bias - mantissa)

    return lambda rank: _signed(numbers, rank)


def _nibbles(words: np.ndarray) -> np.ndarray:
    """Eight codes of 4 bits in each word, the first in its lowest bits."""
    return (words[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(*words.shape[:-1], -1)


@dataclass(frozen=True)
class Scaled:
    """Numbers level(rank)·(scale·unit), the scale being the group's largest magnitude.

    width: bits of a code. two: whether a code is a two's complement, else sign and magnitude. held: nonnegative
    numbers, none of which becomes zero: the lowest level above it takes all that are below. dithered: never rounded to
    nearest. top_reach: as in `Logarithmic`; a scale is exact.
    """

    width: int
    unit: np.float32
    level: Callable[[np.ndarray], np.ndarray] = _whole
    two: bool = True
    held: bool = False
    dithered: bool = False
    top_reach = 0.0

    def read(self, codes: np.ndarray, scales: np.ndarray, random: bool) -> Reading:
        """Codes of elements (unsigned, unpacked) and the bits of each one's scale."""
        codes, scale = codes.astype(np.int64), scales.view(np.float32)
        half = 1 << (self.width - 1)
        rank = (codes ^ half) - half if self.two else _rank(codes, self.width)

        def value(rank: np.ndarray) -> np.ndarray:
            return (self.level(rank).astype(np.float32) * (scale * self.unit)).astype(np.float64)

        reading = _reading(value, rank, random)
        down, up = (np.where(scale == 0, TINY, x) for x in reading[1:])
        if self.held:
            down = np.where(rank == 1, np.maximum(reading.value, down), down)
        return Reading(reading.value, down, up)

    def largest(self, scales: np.ndarray) -> np.ndarray:
        """Magnitude of the largest number of groups; NaN where there is none."""
        scale = scales.view(np.float32).astype(np.float64)
        return np.where(scale == 0, np.nan, scale)


@dataclass(frozen=True)
class Logarithmic:
    """Nonnegative numbers whose fp32 bits, without the last ``shift``, are base + code; code 0 takes all below."""

    width: int
    shift: int
    dithered: bool = True

    @property
    def top_reach(self) -> float:
        """How far a group's largest number may be from the largest code's, as a share of that: one code."""
        return 2.0 ** (self.shift - 23)

    def _value(self, rank: np.ndarray) -> np.ndarray:
        return (np.maximum(rank, 0).astype(np.uint32) << self.shift).view(np.float32).astype(np.float64)

    def read(self, codes: np.ndarray, scales: np.ndarray, random: bool) -> Reading:
        """As `Scaled.read`."""
        rank = codes.astype(np.int64) + scales.view(np.int16)
        reading = _reading(self._value, rank, random=True)
        return reading._replace(down=np.where(codes == 0, np.maximum(reading.value, reading.down), reading.down))

    def largest(self, scales: np.ndarray) -> np.ndarray:
        """As `Scaled.largest`."""
        base = scales.view(np.int16).astype(np.int64)
        return np.where(base == 0, np.nan, self._value(base + (1 << self.width) - 1))


Coded = Scaled | Logarithmic

_SEVENTH = np.float32(9586980 / 2**26)  # the fp32 number below 1/7
_E4M3, _E5M2 = (np.float32(_SEVENTH * np.float32(7 / most)) for most in (448.0, 57344.0))
_THREE, _TWO = _float8(3, 7), _float8(2, 15)
INT8 = Scaled(8, np.float32(1 / 127))
UINT8 = Logarithmic(8, 19)
CODED: dict[str, dict[str, Coded]] = {
    "int8": {"signed": INT8, "nonnegative": UINT8},
    "uint8": {"nonnegative": UINT8},
    "float8_e4m3": {
        "signed": Scaled(8, _E4M3, _THREE, two=False),
        "nonnegative": Scaled(8, _E4M3, _THREE, two=False, held=True),
    },
    "float8_e5m2": {
        "signed": Scaled(8, _E5M2, _TWO, two=False),
        "nonnegative": Scaled(8, _E5M2, _TWO, two=False, held=True),
    },
    "int4": {"signed": Scaled(4, _SEVENTH), "nonnegative": Logarithmic(4, 22)},
}
"""Value of ``state_dtype`` → kind of slot → how it is kept."""


def read_coded(
    form: Coded, codes: np.ndarray, scales: np.ndarray, shape: tuple[int, ...], random: bool
) -> tuple[Reading, np.ndarray]:
    """Numbers of a parameter's slot, and the largest magnitude of each group, (rows, groups).

    Raises:
        ValueError: codes or scales are not of the shapes that the format has.
    """
    rows, length = shape[0], int(np.prod(shape[1:]))
    groups = -(-length // GROUP)
    expected = shape if form.width == 8 else (rows, groups * GROUP // 8)
    if codes.shape != expected or scales.shape != (rows, groups):
        raise ValueError(f"codes {codes.shape} and scales {scales.shape} for a parameter of shape {shape}")
    flat = (_nibbles(codes) if form.width == 4 else codes.reshape(rows, -1))[:, :length]
    each = np.repeat(scales, GROUP, axis=1)[:, :length]
    reading = form.read(flat, np.ascontiguousarray(each), random)
    return Reading(*(x.reshape(shape) for x in reading)), form.largest(scales)


def group_maxima(x: np.ndarray) -> np.ndarray:
    """Largest magnitude of each group, (rows, groups)."""
    rows = np.abs(x.reshape(len(x), -1))
    filled = np.pad(rows, ((0, 0), (0, -rows.shape[1] % GROUP)))
    return filled.reshape(len(x), -1, GROUP).max(axis=2)
