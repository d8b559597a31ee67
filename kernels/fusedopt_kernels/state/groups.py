"""What quantised formats share: groups of GROUP neighbours with one scale, and blocks of codes.

A block of N elements has N/8 octets (``place.py``); what belongs to a group is kept once per octet, so that a thread
finds it among its own registers.

A scale is the group's largest magnitude, in fp32: the largest element is exact (within an ulp) and may drift by less
than a code; rounded itself, to bf16 say, it would stand still and hold the group with it. Groups below 2⁻¹⁰⁰ have scale
0 and are stored as zeros. A group that holds inf or NaN has scale NaN, and so becomes NaN.
"""

import torch
import triton
import triton.language as tl

from .. import memory
from ..numerics import div
from ..table import SCALE_GROUP as GROUP

_OCTETS = tl.constexpr(GROUP // 8)

TINY = 0x0D800000
"""Bits of 2⁻¹⁰⁰."""
_TINY = tl.constexpr(TINY)
SEVENTH = 9586980 / 2**26
"""The fp32 number below 1/7: times 7 and a scale it is never above the scale, so that loading and storing a group again
and again does not raise it.
"""


@triton.jit
def largest(x):
    """(N,) to (N/8,): the largest in each octet's group."""
    n: tl.constexpr = x.shape[0] // 8
    eight = tl.max(tl.reshape(x, (n, 8)), axis=1)
    group = tl.max(tl.reshape(eight, (n // _OCTETS, _OCTETS)), axis=1)
    return tl.reshape(tl.broadcast_to(tl.expand_dims(group, 1), (n // _OCTETS, _OCTETS)), (n,))


@triton.jit
def inside(x, at, FULL: tl.constexpr):
    """x where an element exists, else 0: what lies beyond must not enter a group's maximum."""
    if FULL:
        return x
    else:
        return tl.where(at[2], x, tl.zeros_like(x))


@triton.jit
def load_scale(address, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    """(N/8,): the number beside each octet's group."""
    return memory.load(address, (at[3], at[4], at[5]), T, COMPUTE, FULL)


@triton.jit
def store_scale(address, at, x, T: tl.constexpr, FULL: tl.constexpr):
    """All octets of a group hold, and write, the same."""
    memory.store(address, (at[3], at[4], at[5]), x, T, FULL)


@triton.jit
def scale_of(x, at, FULL: tl.constexpr):
    """(N,) to (N/8,): the scale of each octet's group."""
    top = largest(inside(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, at, FULL))
    top = tl.where(top < _TINY, 0, tl.where(top < 0x7F800000, top, 0x7FC00000))
    return top.to(tl.float32, bitcast=True)


@triton.jit
def steps_of(most, scale):
    """most / scale: what values are multiplied by to become codes up to ``most``; tiny ones become 0 by any factor."""
    return div(tl.zeros_like(scale) + most, tl.where(scale == 0.0, 1.0, scale), True)


def scale_eager(x: torch.Tensor) -> torch.Tensor:
    """Eager twin of `scale_of`: (groups, GROUP) to (groups,) fp32."""
    top = (x.view(torch.int32) & 0x7FFFFFFF).amax(1)
    return top.masked_fill_(top < TINY, 0).masked_fill_(top >= 0x7F800000, 0x7FC00000).view(torch.float32)


def steps_eager(most: float, scale: torch.Tensor) -> torch.Tensor:
    """Eager twin of `steps_of`, (groups, 1)."""
    return (torch.full_like(scale, most) / scale.masked_fill(scale == 0.0, 1.0))[:, None]  # most / scale rounds twice
