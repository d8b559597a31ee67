"""The norm pass over one gradient, launched as soon as backward has produced it.

Chunks, blocks, sums and the place of a partial are those of ``norm.py``; only the gradient's address comes as an
argument, since no table could be uploaded in time.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from . import launch, table
from .norm import store_partial
from .numerics import triton_type


@triton.jit(do_not_specialize=["gradient"])
def source_kernel(
    row, partials, gradient: tl.int64,  # pyright: ignore[reportInvalidTypeForm] # Triton's way to fix a type
    GRAD: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial of one chunk. row: of the gradient's segment; gradient: its address."""
    chunk = tl.program_id(0).to(tl.int64)
    store_partial(row, gradient, (gradient & 15) == 0, chunk, partials, GRAD, KIND, CHUNK, BLOCK)


@cache
def source_spec(grad: torch.dtype, kind: int) -> launch.KernelSpec:
    """`source_kernel` for gradients of one dtype; kind: one of table's ``NORM_…``."""
    items = (("GRAD", triton_type(grad)), ("KIND", kind), ("CHUNK", table.NORM_CHUNK), ("BLOCK", table.NORM_BLOCK))
    return launch.KernelSpec("norm_source", source_kernel, items)
