"""float32: an fp32 copy of every bf16 or fp16 weight: 6 bytes per element. The weight is only written, never read.

The copy counts. ``fusedopt/plan.py`` sees when something else wrote to the parameter and renews it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import memory
from ..numerics import triton_type
from .format import WeightFormat


@triton.jit
def load_master(param, residual, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    return memory.load(residual, at, tl.float32, COMPUTE, FULL)


@triton.jit
def store_master(param, residual, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    memory.store(param, at, x, T, FULL)
    return memory.store(residual, at, x, tl.float32, FULL)


def codec(dtype: torch.dtype, random: bool) -> tuple[Any, ...]:
    """The device codec."""
    return (load_master, store_master, triton_type(dtype), False)


def load_eager(param: torch.Tensor, residual: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Eager twin of `load_master`."""
    return residual.clone() if out is None else out.copy_(residual)


def store_eager(x: torch.Tensor, param: torch.Tensor, residual: torch.Tensor, noise: torch.Tensor | None) -> None:
    """Eager twin of `store_master`."""
    param.copy_(x)
    residual.copy_(x)


def initial(param: torch.Tensor) -> torch.Tensor:
    """The copy of a weight."""
    return param.detach().to(torch.float32, memory_format=torch.preserve_format)


MASTER = WeightFormat("float32", codec, load_eager, store_eager, "master_param", torch.float32, initial)
