"""int8: signed state in 8 bits, linear, with one fp32 scale per group: 1.0625 bytes per element.

``s`` is the group's largest magnitude (``groups.py``), the code is x·(127/s) rounded to nearest even,
``x̂ = code·(s/127)``. Rounded stochastically, 15 random bits are added below the code's last.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import memory
from ..place import spread
from .format import StateFormat
from .groups import load_scale, scale_eager, scale_of, steps_eager, steps_of, store_scale

MAGIC, MAGIC_BITS = 12582912.0, 0x4B400000
"""1.5 · 2²³ and its bits: what is added to it is rounded to a whole number, in the last bits."""
_MAGIC, _MAGIC_BITS = tl.constexpr(MAGIC), tl.constexpr(MAGIC_BITS)


@triton.jit
def rounded(y, noise, RANDOM: tl.constexpr):
    """|y| < 128 to a whole number: the last 8 bits of what is returned, int32, are its two's complement."""
    if RANDOM:
        fixed = (y * 32768.0 + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS
        return (fixed + (noise >> 1).to(tl.int32)) >> 15
    else:
        return (y + _MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def load_int8(values, scales, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    code = memory.load(values, at, tl.uint8, tl.int32, FULL)
    scale = load_scale(scales, at, tl.float32, tl.float32, FULL) * (1.0 / 127.0)
    return ((code ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0) * spread(scale)


@triton.jit
def store_int8(values, scales, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    scale = scale_of(x, at, FULL)
    code = rounded(x * spread(steps_of(127.0, scale)), noise, RANDOM)
    memory.store(values, at, code, tl.int8, FULL)
    store_scale(scales, at, scale, tl.float32, FULL)


def codec(random: bool) -> tuple[Any, ...]:
    """The device codec."""
    return (load_int8, store_int8, tl.int8, random)


def rounded_eager(y: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Eager twin of `rounded`; noise: int32, or None."""
    if noise is not None:
        return ((y * 32768.0 + MAGIC).view(torch.int32) - MAGIC_BITS + (noise >> 1)) >> 15
    return (y + MAGIC).view(torch.int32)


def load_eager(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Eager twin of `load_int8`: (groups, GROUP) codes and (groups,) scales to fp32 values."""
    return codes.to(torch.float32) * (scales * (1.0 / 127.0))[:, None]


def store_eager(x: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager twin of `store_int8`: (groups, GROUP) fp32 values to codes and scales; noise: int32, or None."""
    scale = scale_eager(x)
    code = rounded_eager(x * steps_eager(127.0, scale), noise)
    return (code & 0xFF).to(torch.uint8).view(torch.int8), scale


INT8 = StateFormat("int8", torch.int8, torch.float32, codec, load_eager, store_eager)
