"""Clipping gradients where they lie: from the partials of the norm pass to norms, and one in-place product.

The norm is that of a step: the same partials (``norm.py``) in the same tree (``total.py``).
"""

from functools import cache

import torch
import triton
import triton.language as tl

from . import launch, memory, table, tuning
from .norm import root
from .numerics import compute_type, div, triton_type
from .table import ALIGNED, FLAGS, NUMEL, ROW_WIDTH, SCALAR_WIDTH
from .total import total_norm


@triton.jit
def combine_kernel(
    rows, scalars, partials, counts, norm,
    KIND: tl.constexpr, ROOT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One set of segments per program. ROOT: its norm, fp32 or, WIDE, fp64; else its sum in fp64.

    ``counts`` starts with (first segment, place of its counts) of every set.
    """
    pid = tl.program_id(0)
    first = tl.load(counts + 2 * pid)
    own = counts + tl.load(counts + 2 * pid + 1)
    total, _ = total_norm(rows + first * ROW_WIDTH, partials, own, scalars + first * SCALAR_WIDTH, KIND)
    if ROOT:
        total = root(total, KIND)
    if WIDE:
        tl.store(norm.to(tl.pointer_type(tl.float64), bitcast=True) + pid, total)
    else:
        tl.store(norm + pid, total.to(tl.float32))


@triton.jit
def coefficient(norm, limit):
    """min(1, limit / (norm + 1e-6)) with the roundings of `torch.nn.utils.clip_grad_norm_`, in the norm's type.

    torch divides a Python number by a tensor as reciprocal times number. NaN stays NaN.
    """
    ratio = div(tl.full((), 1.0, norm.dtype), norm + 1e-6, True) * limit.to(norm.dtype)
    return tl.where(ratio > 1.0, 1.0, ratio)


@triton.jit
def _scale_block(gradient, at, c, GRAD: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    x = memory.load(gradient, at, GRAD, COMPUTE, FULL)
    memory.store(gradient, at, x * c, GRAD, FULL)


@triton.jit
def scale_kernel(
    rows, grads, chunks, norm, limit,
    GRAD: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Gradient times coefficient, one chunk. A coefficient of 1 would change nothing: nothing is read or written."""
    if WIDE:
        total = tl.load(norm.to(tl.pointer_type(tl.float64), bitcast=True))
    else:
        total = tl.load(norm)
    c = coefficient(total, tl.load(limit)).to(COMPUTE)
    if c != 1.0:
        pid = tl.program_id(0)
        segment = tl.load(chunks + 2 * pid).to(tl.int64)
        start = tl.load(chunks + 2 * pid + 1).to(tl.int64) * CHUNK
        row = rows + segment * ROW_WIDTH
        gradient = tl.load(grads + segment)
        left = tl.load(row + NUMEL) - start
        if (left >= CHUNK) & ((tl.load(row + FLAGS) & ALIGNED) != 0):
            lanes = tl.arange(0, BLOCK)
            for o in range(0, CHUNK, BLOCK):
                _scale_block(gradient, (start + o, lanes, lanes < BLOCK), c, GRAD, COMPUTE, True)
        else:
            few = tl.arange(0, TAIL)
            rest = tl.minimum(left, CHUNK).to(tl.int32)
            done = rest * 0
            while done < rest:
                _scale_block(gradient, (start + done, few, done + few < rest), c, GRAD, COMPUTE, False)
                done += TAIL


@cache
def combine_spec(kind: int, root: bool, wide: bool) -> launch.KernelSpec:
    """`combine_kernel`; the result is fp64 if it is a sum or ``wide``."""
    return launch.KernelSpec("combine", combine_kernel, (("KIND", kind), ("ROOT", root), ("WIDE", wide or not root)))


@cache
def scale_spec(grad: torch.dtype, wide: bool) -> launch.KernelSpec:
    """`scale_kernel` over gradients of one dtype; wide: the norm is fp64."""
    shape = tuning.shape([triton_type(grad)])
    items = (
        ("GRAD", triton_type(grad)),
        ("COMPUTE", triton_type(compute_type(grad))),
        ("WIDE", wide),
        ("CHUNK", table.CHUNK),
        ("BLOCK", shape.block),
        ("TAIL", shape.tail),
    )
    return launch.KernelSpec("scale", scale_kernel, items, shape.warps)
