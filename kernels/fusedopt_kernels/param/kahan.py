"""kahan: bf16 or fp16 weights with a second number of their dtype, the error of rounding: 4 bytes per element.

``x = p + c``; a new x gives ``p = round(x)``, ``c = round(x − p)``: 16 (bf16) or 22 (fp16) bits of mantissa in all, as
long as c is a normal number. p is then made the number nearest to p + c, where c was rounded to a tie. Decay and update
enter x before anything is rounded (Kahan 1965, "Further remarks on reducing truncation errors", with the sum of both
terms as one update).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import memory
from ..numerics import narrow, triton_type, widen
from .format import WeightFormat


@triton.jit
def load_kahan(param, residual, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    p, c = memory.load(param, at, T, COMPUTE, FULL), memory.load(residual, at, T, COMPUTE, FULL)
    return tl.where(c == 0.0, p, p + c)  # -0.0 + 0.0 would be 0.0


@triton.jit
def store_kahan(param, residual, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    p = widen(narrow(x, T), T, tl.float32)
    c = widen(narrow(tl.where(tl.abs(p) < float("inf"), x - p, 0.0), T), T, tl.float32)
    s = tl.where(c == 0.0, p, p + c)
    nearest = widen(narrow(s, T), T, tl.float32)  # another number than p where c was rounded to a tie
    p, c = (
        tl.where(tl.abs(nearest) < float("inf"), nearest, p),
        tl.where(tl.abs(nearest) < float("inf"), s - nearest, c),
    )
    memory.store(param, at, p, T, FULL)
    memory.store(residual, at, c, T, FULL)
    return s


def codec(dtype: torch.dtype, random: bool) -> tuple[Any, ...]:
    """The device codec."""
    return (load_kahan, store_kahan, triton_type(dtype), False)


def load_eager(param: torch.Tensor, residual: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Eager twin of `load_kahan`."""
    p, c = param.to(torch.float32), residual.to(torch.float32)
    x = torch.where(c == 0.0, p, p + c)
    return x if out is None else out.copy_(x)


def store_eager(x: torch.Tensor, param: torch.Tensor, residual: torch.Tensor, noise: torch.Tensor | None) -> None:
    """Eager twin of `store_kahan`."""
    p = x.to(param.dtype).to(torch.float32)
    c = (x - p).masked_fill_(~(p.abs() < torch.inf), 0.0).to(param.dtype).to(torch.float32)
    s = torch.where(c == 0.0, p, p + c)
    nearest = s.to(param.dtype).to(torch.float32)
    finite = nearest.abs() < torch.inf
    param.copy_(torch.where(finite, nearest, p))
    residual.copy_(torch.where(finite, s - nearest, c))


def initial(param: torch.Tensor) -> torch.Tensor:
    """Residual of a weight that is exactly representable."""
    return torch.zeros_like(param.detach(), memory_format=torch.preserve_format)


KAHAN = WeightFormat("kahan", codec, load_eager, store_eager, "param_residual", None, initial)
