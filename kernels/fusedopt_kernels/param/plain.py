"""Weights kept in their own dtype and nothing else: 8 (fp64), 4 (fp32) or 2 (bf16, fp16) bytes per element.

The contract of a weight codec, a flat tuple ``(load, store, type, random)``:

* ``load(param, residual, at, T, COMPUTE, FULL)`` yields the exact value that the format holds;
* ``store(param, residual, at, x, noise, T, RANDOM, FULL)`` takes the new value, rounds it once and returns what the
  format then holds. noise: 16 random bits per element if RANDOM, which is how stochastic formats round.

Rules and the step kernel see values only: how a format keeps what rounding would lose is its own affair.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import memory
from ..numerics import triton_type


@triton.jit
def load_plain(param, residual, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    return memory.load(param, at, T, COMPUTE, FULL)


@triton.jit
def store_plain(param, residual, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    return memory.store(param, at, x, T, FULL)


def codec(dtype: torch.dtype, random: bool = False) -> tuple[Any, ...]:
    """The device codec of weights of ``dtype``."""
    return (load_plain, store_plain, triton_type(dtype), False)
