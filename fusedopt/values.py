"""Blocks of elements for eager twins: ordinary arithmetic, written into a pool of scratch buffers.

A twin reads like its kernel (``m + q1 * (g - m)``) and allocates nothing: each result takes a buffer from the pool
and gives it back when Python drops the last reference. Buffers are a block long, so they stay in cache.
"""

import math
from typing import Any

import numpy as np
import torch


class Pool:
    """Scratch buffers of one dtype and device, all as long as the block at hand."""

    def __init__(self, dtype: torch.dtype, device: torch.device, block: int) -> None:
        self.dtype, self.device, self.block = dtype, device, block
        self._buffers: list[torch.Tensor] = []
        self._length = 0
        self._free: list[torch.Tensor] = []

    def set_length(self, n: int) -> None:
        """Make every buffer n elements long, n ≤ block. No value may be alive."""
        if n != self._length:
            self._length = n
            self._free = [b[:n] for b in self._buffers]

    def take(self) -> torch.Tensor:
        if self._free:
            return self._free.pop()
        self._buffers.append(torch.empty(self.block, dtype=self.dtype, device=self.device))
        return self._buffers[-1][: self._length]

    def give(self, buffer: torch.Tensor) -> None:
        self._free.append(buffer)

    def load(self, x: torch.Tensor) -> "Values":
        """x in the pool's dtype: itself if it has it, else a converted copy."""
        if x.dtype == self.dtype:
            return Values(x, self, borrowed=True)
        return Values(self.take().copy_(x), self)


class Values:
    """One block of numbers; results of arithmetic live in the pool."""

    __slots__ = ("borrowed", "data", "pool")

    def __init__(self, data: torch.Tensor, pool: Pool, borrowed: bool = False) -> None:
        self.data, self.pool, self.borrowed = data, pool, borrowed

    def __del__(self) -> None:
        if not self.borrowed:
            self.pool.give(self.data)

    def _apply(self, fn: Any, *operands: Any) -> "Values":
        pool = self.pool
        operands = tuple(o.data if isinstance(o, Values) else o for o in operands)
        return Values(fn(*operands, out=pool.take()), pool)

    def __add__(self, other: Any) -> "Values":
        return self._apply(torch.add, self, other)

    def __radd__(self, other: Any) -> "Values":
        return self._apply(torch.add, self, other)

    def __sub__(self, other: Any) -> "Values":
        return self._apply(torch.sub, self, other)

    def __rsub__(self, other: float) -> "Values":
        # torch.rsub has no out=; a 0-dim operand of the same dtype gives other − self in one rounding
        return self._apply(torch.sub, torch.tensor(other, dtype=self.data.dtype, device=self.data.device), self)

    def __mul__(self, other: Any) -> "Values":
        return self._apply(torch.mul, self, other)

    def __rmul__(self, other: Any) -> "Values":
        return self._apply(torch.mul, self, other)

    def __truediv__(self, other: Any) -> "Values":
        return self._apply(torch.div, self, other)


def div_eager(a: Values, b: Values) -> Values:
    """a / b, correctly rounded."""
    return a / b


def sqrt_eager(x: Values) -> Values:
    """Square root, correctly rounded: NumPy's on the CPU, because torch's there is a library's with 1 ulp of error."""
    if x.data.device.type != "cpu":
        return x._apply(torch.sqrt, x)
    out = x.pool.take()
    np.sqrt(x.data.numpy(), out=out.numpy())
    return Values(out, x.pool)


def maximum_eager(a: Values, b: Values) -> Values:
    """Larger of a and b; NaN if either is NaN."""
    return a._apply(torch.maximum, a, b)


def sqrt_scalar(x: float) -> float:
    """Square root of a float64 scalar, correctly rounded; NaN below zero as on the device."""
    return math.sqrt(x) if x >= 0.0 else math.nan
