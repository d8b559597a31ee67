"""Formats of state in NumPy float64, written from their docstrings, and inputs that reach every corner of them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fusedopt_kernels.state.float8 import E4M3, E4M3_NONNEGATIVE, E5M2, E5M2_NONNEGATIVE
from fusedopt_kernels.state.format import StateFormat
from fusedopt_kernels.state.int4 import INT4
from fusedopt_kernels.state.int8 import INT8
from fusedopt_kernels.state.uint4 import UINT4
from fusedopt_kernels.state.uint8 import UINT8
from fusedopt_kernels.table import SCALE_GROUP as GROUP


@dataclass(frozen=True, eq=False)
class Scaled:
    """A format with a scale s: code c stands for ``value(c) · s / most``."""

    format: StateFormat
    name: str
    most: float
    signed: bool = True

    def __str__(self) -> str:
        return self.name

    @cached_property
    def values(self) -> np.ndarray:
        """What each code stands for, in units of s/most; NaN for those that are never written."""
        if self.most in (7.0, 127.0):
            n = 8 if self.most == 7.0 else 128
            codes = np.arange(2 * n)
            return np.where(codes < n, codes, codes - 2.0 * n)
        codes = torch.arange(256, dtype=torch.uint8).view(self.format.code)
        values = codes.to(torch.float64).numpy()
        return np.where(np.isfinite(values), values, np.nan)

    @cached_property
    def grid(self) -> np.ndarray:
        """Magnitudes that are written, ascending; nonnegative state has no zero beside other values."""
        magnitudes = np.unique(np.abs(self.values[np.isfinite(self.values)]))
        magnitudes = magnitudes[magnitudes <= self.most]
        return magnitudes if self.signed else magnitudes[1:]

    def scale(self, x: np.ndarray) -> np.ndarray:
        """(groups,): largest magnitude; 0 below 2⁻¹⁰⁰, NaN where not finite."""
        top = np.abs(x.astype(np.float64)).max(axis=1)
        return np.where(np.isfinite(top), np.where(top < 2.0**-100, 0.0, top), np.nan)

    def distance(self, y: np.ndarray) -> np.ndarray:
        """From |y| to the nearest number of the grid."""
        y = np.abs(y)
        above = np.searchsorted(self.grid, y).clip(1, len(self.grid) - 1)
        return np.minimum(np.abs(y - self.grid[above - 1]), np.abs(y - self.grid[above]))

    def step(self, y: np.ndarray) -> np.ndarray:
        """Distance between the numbers of the grid around |y|."""
        above = np.searchsorted(self.grid, np.abs(y), side="right").clip(1, len(self.grid) - 1)
        return self.grid[above] - self.grid[above - 1]


@dataclass(frozen=True, eq=False)
class Log:
    """A format that drops ``shift`` bits of fp32 and counts from the group's base."""

    format: StateFormat
    name: str
    shift: int
    most: int
    signed = False

    def __str__(self) -> str:
        return self.name

    def number(self, x: np.ndarray, nearest: bool = True) -> np.ndarray:
        """k(x): which of the numbers with 23 − shift bits of mantissa x is, ties up; 0 is zero. NaN: the last."""
        mantissa = 23 - self.shift
        x = x.astype(np.float64)
        finite = np.isfinite(x)
        _, exponent = np.frexp(np.where(finite & (x > 0), x, 1.0))
        exponent = np.maximum(exponent - 1, -126)
        units = np.floor(np.where(finite, x, 0.0) / np.exp2(exponent - mantissa) + (0.5 if nearest else 0.0))
        k = units + ((exponent + 126).astype(np.int64) << mantissa)
        special = np.where(np.isnan(x), 0x7FC00000 >> self.shift, 0x7F800000 >> self.shift)
        return np.where(finite, np.where(x == 0, 0, k), special).astype(np.int64)

    def value(self, k: np.ndarray) -> np.ndarray:
        """The number with that k, in float64."""
        mantissa = 23 - self.shift
        exponent, rest = np.maximum(k >> mantissa, 1), k & ((1 << mantissa) - 1)
        value = (rest + np.where(k >> mantissa > 0, 1 << mantissa, 0)) * np.exp2(exponent - 127.0 - mantissa)
        return np.where(k >> mantissa == 255, np.where(rest == 0, np.inf, np.nan), value)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """What is kept of (groups, GROUP) nonnegative values."""
        k = self.number(x)
        base = np.maximum(k.max(axis=1) - self.most, 0)
        return np.where(np.isnan(x).any(axis=1, keepdims=True), np.nan, self.value(np.maximum(k, base[:, None])))


SCALED = (
    Scaled(INT8, "int8", 127.0),
    Scaled(INT4, "int4", 7.0),
    Scaled(E4M3, "e4m3", 448.0),
    Scaled(E5M2, "e5m2", 57344.0),
    Scaled(E4M3_NONNEGATIVE, "e4m3 nonnegative", 448.0, signed=False),
    Scaled(E5M2_NONNEGATIVE, "e5m2 nonnegative", 57344.0, signed=False),
)
LOG = (Log(UINT8, "uint8", 19, 255), Log(UINT4, "uint4", 22, 15))
ALL = (*SCALED, *LOG)


def codes_of(case: Scaled | Log) -> int:
    """How many there are."""
    return 256 if case.format.packed == 1 else 16


def as_codes(case: Scaled | Log, codes: np.ndarray) -> torch.Tensor:
    """(groups, GROUP) numbers from 0 on, as the format keeps them: 4-bit ones eight to a word, the first lowest."""
    if case.format.packed == 1:
        return torch.from_numpy(codes.astype(np.uint8)).view(case.format.code)
    words = (codes.reshape(len(codes), -1, 8).astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=2)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def from_codes(case: Scaled | Log, codes: torch.Tensor) -> np.ndarray:
    """The reverse."""
    if case.format.packed == 1:
        return codes.view(torch.uint8).numpy().astype(np.int64)
    return (codes.numpy()[:, :, None] >> np.arange(0, 32, 4) & 15).reshape(len(codes), -1)


def kept(case: Scaled | Log, x: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
    """What the format makes of (groups, GROUP) values, in float64, by its eager form; noise: see `StateFormat`."""
    bits = None if noise is None else torch.from_numpy(noise)
    codes, scales = case.format.store(torch.from_numpy(x.astype(np.float32)), bits)
    assert codes.shape == (len(x), GROUP // case.format.packed) and codes.dtype == case.format.code
    assert scales.shape == (len(x),) and scales.dtype == case.format.scale
    return case.format.load(codes, scales).numpy().astype(np.float64)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """fp32 numbers from their bits; NaN quiet, as all arithmetic leaves it."""
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return ((bits | np.where(nan, 0x400000, 0)) & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def every_bf16() -> np.ndarray:
    """All 65,536."""
    return from_bits(np.arange(65536, dtype=np.int64) << 16)


def around_ties(mantissa: int) -> np.ndarray:
    """Every exponent of fp32 with every mantissa of so many bits, the ties between them, and one bit beside both."""
    drop = 23 - mantissa
    high = np.arange(1 << (9 + mantissa), dtype=np.int64) << drop
    low = np.array([0, 1, (1 << drop) - 1, (1 << (drop - 1)) - 1, 1 << (drop - 1), (1 << (drop - 1)) + 1])
    return from_bits((high[:, None] + low).reshape(-1))


def grouped(x: np.ndarray, first: float) -> np.ndarray:
    """(groups, GROUP): ``first`` and then GROUP − 1 numbers of x in each; the last is filled up with zeros."""
    rows = -(-len(x) // (GROUP - 1))
    full = np.zeros((rows, GROUP), dtype=np.float32)
    full[:, 0] = first
    full[:, 1:] = np.pad(x, (0, rows * (GROUP - 1) - len(x))).reshape(rows, GROUP - 1)
    return full
