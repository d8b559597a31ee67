"""Deterministic gradient norm and non-finite check: one partial per chunk, no float atomics.

Lanes are fp64 on every device, so squares of fp32, bf16 and fp16 gradients neither overflow nor underflow. The
chunk, the block and the order of the sums are part of the norm's definition: a parameter's partials do not depend
on how parameters are grouped, flattened or launched. Non-finite is decided from the elements, never from an overflowed
sum: a chunk's sum of fp32 squares cannot overflow fp64, so it is finite exactly when its elements are; squares of fp64
gradients can, so there each element is looked at (11.6 instructions per bf16 element, where the sum takes 5.4).
"""

import triton
import triton.language as tl

from . import memory
from .table import ALIGNED, FLAGS, NORM_START, NUMEL, ROW_WIDTH


@triton.jit
def _accumulate(gradient, at, total, bad, GRAD: tl.constexpr, FULL: tl.constexpr):
    x = memory.load(gradient, at, GRAD, tl.float64, FULL)
    if GRAD == tl.float64:
        bad = bad | (tl.abs(x) < float("inf")).to(tl.int32) ^ 1
    return total + x * x, bad


@triton.jit
def norm_kernel(
    rows, grads, chunks, partials, GRAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Partial ``(sum of squares, > 0 if an element is inf or NaN)`` of one chunk of one gradient."""
    pid = tl.program_id(0)
    segment = tl.load(chunks + 2 * pid).to(tl.int64)
    chunk = tl.load(chunks + 2 * pid + 1).to(tl.int64)
    row = rows + segment * ROW_WIDTH
    gradient = tl.load(grads + segment)
    start = chunk * CHUNK
    left = tl.load(row + NUMEL) - start
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    bad = tl.zeros((BLOCK,), tl.int32)
    if (left >= CHUNK) & ((tl.load(row + FLAGS) & ALIGNED) != 0):
        for o in range(0, CHUNK, BLOCK):
            total, bad = _accumulate(gradient, (start + o, lanes, lanes < BLOCK), total, bad, GRAD, True)
    else:
        rest = tl.minimum(left, CHUNK).to(tl.int32)
        done = rest * 0
        while done < rest:
            total, bad = _accumulate(gradient, (start + done, lanes, done + lanes < rest), total, bad, GRAD, False)
            done += BLOCK
    slot = partials + 2 * (tl.load(row + NORM_START) + chunk)
    square = tl.sum(total)
    tl.store(slot, square)
    if GRAD == tl.float64:
        tl.store(slot + 1, tl.sum(bad).to(tl.float64))
    else:
        tl.store(slot + 1, (tl.abs(square) < float("inf")).to(tl.float64) * -1.0 + 1.0)
