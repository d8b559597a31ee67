"""split16: bf16 weights that lose nothing. 4 bytes per element: the bf16 weight and 16 more bits beside it.

With ``b = bits(x) + 0x8000`` the weight is ``b >> 16`` (x rounded to bf16, ties up in magnitude) and the residual
is ``b & 0xFFFF``; ``x = bits⁻¹((weight << 16 | residual) − 0x8000)``. Exact for every finite fp32. Rounding to
nearest even instead would need a signed residual of 17 bits. NaN is made quiet first: CUDA's canonical NaN would
otherwise carry into −0.0 and hide from the forward pass.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import memory
from ..rng import quiet_bits
from .format import WeightFormat


@triton.jit
def load_split16(param, residual, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    high = memory.load(param, at, tl.int16, tl.int32, FULL)
    low = memory.load(residual, at, tl.int16, tl.int32, FULL) & 0xFFFF
    return (((high << 16) | low) - 0x8000).to(tl.float32, bitcast=True)


@triton.jit
def store_split16(param, residual, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    b = quiet_bits(x) + 0x8000
    memory.store(param, at, b >> 16, tl.int16, FULL)
    memory.store(residual, at, b & 0xFFFF, tl.int16, FULL)
    return x


def codec(dtype: torch.dtype, random: bool) -> tuple[Any, ...]:
    """The device codec; bf16 only, because an fp16 weight and 16 bits do not hold an fp32 number.

    Raises:
        ValueError: another dtype.
    """
    if dtype != torch.bfloat16:
        raise ValueError(f"master_weights='split16' needs bfloat16 parameters, got {dtype}; use 'float32' instead")
    return (load_split16, store_split16, tl.bfloat16, False)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high) 16 bits of fp32 numbers, as int16 views; memory is little-endian wherever torch and Triton run."""
    both = x.unsqueeze(-1).view(torch.int16)
    return both[..., 0], both[..., 1]


def load_eager(param: torch.Tensor, residual: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The fp32 values held by a bf16 weight and its int16 residual, in ``out`` or a new tensor."""
    x = torch.empty_like(param, dtype=torch.float32) if out is None else out
    low, high = _halves(x)
    low.copy_(residual)
    high.copy_(param.view(torch.int16))
    x.view(torch.int32).sub_(0x8000)
    return x


def store_eager(x: torch.Tensor, param: torch.Tensor, residual: torch.Tensor, noise: torch.Tensor | None) -> None:
    """Write fp32 values into a bf16 weight and its int16 residual; x is used up."""
    bits = x.view(torch.int32)
    if torch.isnan(x.sum()):  # a cheap test; what it finds is rare
        bits.masked_fill_(torch.isnan(x), 0x7FC00000)
    bits.add_(0x8000)
    low, high = _halves(x)
    residual.copy_(low)
    param.view(torch.int16).copy_(high)


def initial(param: torch.Tensor) -> torch.Tensor:
    """Residual of a weight that is exactly representable: 0x8000 everywhere, in the parameter's layout."""
    return torch.full_like(param, -0x8000, dtype=torch.int16, memory_format=torch.preserve_format)


SPLIT16 = WeightFormat("split16", codec, load_eager, store_eager, "param_residual", torch.int16, initial)
