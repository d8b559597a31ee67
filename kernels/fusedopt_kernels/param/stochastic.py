"""stochastic: bf16 or fp16 weights and nothing beside them, rounded up or down at random: 2 bytes per element.

The expected value of what is stored is the new value (`rng.stochastic`), so that small updates and weight decay
add up where rounding to nearest would lose them; the price is noise of half a unit in the last place at every step.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import memory
from ..numerics import triton_type
from ..rng import stochastic, stochastic_eager
from .format import WeightFormat
from .plain import load_plain


@triton.jit
def store_stochastic(param, residual, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    return memory.store(param, at, stochastic(x, noise, T), T, FULL)


def codec(dtype: torch.dtype, random: bool) -> tuple[Any, ...]:
    """The device codec."""
    return (load_plain, store_stochastic, triton_type(dtype), True)


def load_eager(param: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The values."""
    return param.to(torch.float32) if out is None else out.copy_(param)


def store_eager(
    x: torch.Tensor, param: torch.Tensor, residual: torch.Tensor | None, noise: torch.Tensor | None
) -> None:
    """Eager twin of `store_stochastic`."""
    assert noise is not None
    param.copy_(stochastic_eager(x, noise, param.dtype))


STOCHASTIC = WeightFormat("stochastic", codec, load_eager, store_eager, random=True)
