"""Loads and stores of one block of numbers. The only place where an address becomes a pointer.

``at`` says which block: ``(start, lanes, mask)``: int64 first element, int32 lane numbers, and which lanes exist.
FULL blocks go unmasked, with the 16-byte alignment promise that gives 128-bit accesses; the others are masked.
"""

import triton
import triton.language as tl

from .numerics import narrow, widen


@triton.jit
def pointer(address, at, T: tl.constexpr, FULL: tl.constexpr):
    """Pointer to the block's first element of stored type T (bf16 moves as uint16, see `numerics.narrow`)."""
    S: tl.constexpr = tl.uint16 if T == tl.bfloat16 else T
    p = address.to(tl.pointer_type(S), bitcast=True)
    if FULL:
        p = tl.multiple_of(p, 16)
    return p + at[0]


@triton.jit
def load(address, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    """Block of stored type T, as COMPUTE. Lanes outside the mask read zero."""
    p = pointer(address, at, T, FULL)
    if FULL:
        x = tl.load(p + at[1])
    else:
        x = tl.load(p + at[1], mask=at[2], other=0)
    return widen(x, T, COMPUTE)


@triton.jit
def store(address, at, x, T: tl.constexpr, FULL: tl.constexpr):
    """Store x rounded once to type T; returns the value that is stored."""
    p = pointer(address, at, T, FULL)
    stored = narrow(x, T)
    if FULL:
        tl.store(p + at[1], stored)
    else:
        tl.store(p + at[1], stored, mask=at[2])
    return widen(stored, T, x.dtype)
