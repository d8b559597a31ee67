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


@triton.jit
def load_split16(param, residual, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    high = memory.load(param, at, tl.int16, tl.int32, FULL)
    low = memory.load(residual, at, tl.int16, tl.int32, FULL) & 0xFFFF
    return (((high << 16) | low) - 0x8000).to(tl.float32, bitcast=True)


@triton.jit
def store_split16(param, residual, at, x, T: tl.constexpr, FULL: tl.constexpr):
    b = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True)) + 0x8000
    memory.store(param, at, b >> 16, tl.int16, FULL)
    memory.store(residual, at, b & 0xFFFF, tl.int16, FULL)


def codec(dtype: torch.dtype) -> tuple[Any, ...]:
    """The device codec; bf16 only, because an fp16 weight and 16 bits do not hold an fp32 number."""
    if dtype != torch.bfloat16:
        raise ValueError(f"master_weights='split16' needs bfloat16 parameters, got {dtype}; use 'float32' instead")
    return (load_split16, store_split16, tl.bfloat16)


def join_eager(param: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The fp32 values held by a bf16 weight and its int16 residual (a new tensor)."""
    b = (param.view(torch.int16).to(torch.int32) << 16) | (residual.to(torch.int32) & 0xFFFF)
    return (b - 0x8000).view(torch.float32)


def split_eager(x: torch.Tensor, param: torch.Tensor, residual: torch.Tensor) -> None:
    """Write fp32 values into a bf16 weight and its int16 residual."""
    bits = torch.where(x != x, torch.tensor(0x7FC00000, dtype=torch.int32), x.view(torch.int32)) + 0x8000
    param.view(torch.int16).copy_(bits >> 16)
    residual.copy_(bits)  # int32 → int16 keeps the low 16 bits


def initial_residual(param: torch.Tensor) -> torch.Tensor:
    """Residual of a weight that is exactly representable: 0x8000 everywhere, in the parameter's layout."""
    return torch.full_like(param, -0x8000, dtype=torch.int16, memory_format=torch.preserve_format)
