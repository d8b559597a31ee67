"""split8: bf16 weights with 8 more bits beside them, 24 bits in all: 3 bytes per element.

fp32 bits are first rounded to their upper 24 (to nearest, or up or down by adding 8 random bits: then E = x and no
update is too small to count); what remains is split as in ``split16.py``: with ``b = bits(x) + 0x8000`` the weight is
``b >> 16``, the bf16 number nearest to the 24 bits, ties up in magnitude, and the residual is ``(b >> 8) & 0xFF``;
``x = bits⁻¹((weight << 16 | residual << 8) − 0x8000)``. Nothing is clipped.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import memory
from ..rng import quiet_bits
from .format import WeightFormat


@triton.jit
def load_split8(param, residual, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    high = memory.load(param, at, tl.int16, tl.int32, FULL)
    low = memory.load(residual, at, tl.uint8, tl.int32, FULL)
    return (((high << 16) | (low << 8)) - 0x8000).to(tl.float32, bitcast=True)


@triton.jit
def store_split8(param, residual, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    b = quiet_bits(x) + 0x8000
    b = b + (noise & 0xFF).to(tl.int32) if RANDOM else b + 0x80
    memory.store(param, at, b >> 16, tl.int16, FULL)
    memory.store(residual, at, b >> 8, tl.int8, FULL)
    return ((b & -0x100) - 0x8000).to(tl.float32, bitcast=True)


def codec(dtype: torch.dtype, random: bool) -> tuple[Any, ...]:
    """The device codec; bf16 only.

    Raises:
        ValueError: another dtype.
    """
    if dtype != torch.bfloat16:
        raise ValueError(f"master_weights='split8' needs bfloat16 parameters, got {dtype}; use 'float32' or 'kahan'")
    return (load_split8, store_split8, tl.bfloat16, random)


def load_eager(param: torch.Tensor, residual: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Eager twin of `load_split8`: the fp32 values that a bf16 weight and its uint8 residual hold."""
    both = (param.view(torch.int16).to(torch.int32) << 16) | (residual.to(torch.int32) << 8)
    x = (both - 0x8000).view(torch.float32)
    return x if out is None else out.copy_(x)


def store_eager(x: torch.Tensor, param: torch.Tensor, residual: torch.Tensor, noise: torch.Tensor | None) -> None:
    """Eager twin of `store_split8`; noise: int32, or None to round to nearest."""
    b = x.view(torch.int32).masked_fill(x.isnan(), 0x7FC00000) + 0x8000
    b += 0x80 if noise is None else noise & 0xFF
    param.view(torch.int16).copy_(b >> 16)
    residual.copy_((b >> 8) & 0xFF)


def initial(param: torch.Tensor) -> torch.Tensor:
    """Residual of a weight that is exactly representable."""
    return torch.full_like(param, 0x80, dtype=torch.uint8, memory_format=torch.preserve_format)


SPLIT8 = WeightFormat("split8", codec, load_eager, store_eager, "param_residual", torch.uint8, initial, random=None)
