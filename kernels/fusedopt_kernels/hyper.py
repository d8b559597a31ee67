"""Numbers that kernels read at run time, each a float that the host uploaded or a tensor of the user's."""

import triton
import triton.language as tl

from .table import HYPER_WIDTH


@triton.jit
def load_number(tagged, mask):
    """fp32 or fp64 numbers at tagged addresses (shifted left once; the low bit says fp64), as float64."""
    p32 = (tagged >> 1).to(tl.pointer_type(tl.float32), bitcast=True)
    p64 = (tagged >> 1).to(tl.pointer_type(tl.float64), bitcast=True)
    is64 = (tagged & 1) != 0
    x = tl.load(p32, mask=mask & (is64 == 0), other=0.0).to(tl.float64)
    return tl.where(is64, tl.load(p64, mask=mask & is64, other=0.0), x)


@triton.jit
def store_number(tagged, x, mask):
    """Write float64 numbers to tagged addresses, rounded once to what is there."""
    is64 = (tagged & 1) != 0
    tl.store((tagged >> 1).to(tl.pointer_type(tl.float32), bitcast=True), x.to(tl.float32), mask & (is64 == 0))
    tl.store((tagged >> 1).to(tl.pointer_type(tl.float64), bitcast=True), x, mask & is64)


@triton.jit
def hyper_of(values, addresses, row, COLUMN: tl.constexpr, mask):
    """A column of some rows: the uploaded float, or what a tensor of the user's holds right now."""
    at = row * HYPER_WIDTH + COLUMN
    tagged = tl.load(addresses + at, mask=mask, other=0)
    value = tl.load(values + at, mask=mask, other=0.0)
    return tl.where(tagged != 0, load_number(tagged, mask & (tagged != 0)), value)


@triton.jit
def number_of(values, addresses, COLUMN: tl.constexpr):
    """A column of row 0, as a scalar."""
    one = tl.arange(0, 2)
    return tl.sum(tl.where(one == 0, hyper_of(values, addresses, one.to(tl.int64) * 0, COLUMN, one == 0), 0.0))
