"""State kept as ordinary floating point: fp64, fp32, bf16 or fp16; 8, 4, 2 and 2 bytes per element.

The contract of a state codec, a flat tuple ``(load, store, type)``:

* ``load(values, scales, at, T, COMPUTE, FULL)`` yields the values of a block in the compute type;
* ``store(values, scales, at, x, T, FULL)`` takes them back, rounding once.

``values`` and ``scales`` are the two addresses of the slot in the segment row; ``scales`` is unused here. Beside the
device functions stand the eager twins ``load_eager(tensor)`` and ``store_eager(tensor, x)`` on flat views.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import memory
from ..numerics import triton_type


@triton.jit
def load_values(values, scales, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    return memory.load(values, at, T, COMPUTE, FULL)


@triton.jit
def store_values(values, scales, at, x, T: tl.constexpr, FULL: tl.constexpr):
    memory.store(values, at, x, T, FULL)


def codec(dtype: torch.dtype) -> tuple[Any, ...]:
    """The device codec of a slot stored as ``dtype``."""
    return (load_values, store_values, triton_type(dtype))


def bytes_per_element(dtype: torch.dtype) -> float:
    """Bytes per stored number."""
    return float(dtype.itemsize)
