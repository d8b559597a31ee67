"""State kept as ordinary floating point: fp64, fp32, bf16 or fp16; 8, 4, 2 and 2 bytes per element.

The contract of a state codec, a flat tuple ``(load, store, type, random)``:

* ``load(values, scales, at, T, COMPUTE, FULL)`` yields the values of a block in the compute type;
* ``store(values, scales, at, x, noise, T, RANDOM, FULL)`` takes them back, rounding once: to nearest, or, if RANDOM,
  up or down as ``noise`` says, 16 random bits per element.

``values`` and ``scales`` are the two addresses of the slot in the segment row; ``scales`` is unused here. Beside the
device functions stand the eager twins. ``at`` is described in ``place.py``.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import memory
from ..numerics import triton_type
from ..rng import stochastic


@triton.jit
def load_values(values, scales, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    return memory.load(values, at, T, COMPUTE, FULL)


@triton.jit
def store_values(values, scales, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    if RANDOM:
        x = stochastic(x, noise, T)
    memory.store(values, at, x, T, FULL)


def codec(dtype: torch.dtype, random: bool = False) -> tuple[Any, ...]:
    """The device codec of a slot stored as ``dtype``."""
    return (load_values, store_values, triton_type(dtype), random and dtype in (torch.bfloat16, torch.float16))


def bytes_per_element(dtype: torch.dtype) -> float:
    """Bytes per stored number."""
    return float(dtype.itemsize)
