"""Deterministic gradient norm and non-finite check: one partial per chunk, no float atomics.

Lanes are fp64 on every device, so squares of fp32, bf16 and fp16 gradients neither overflow nor underflow. The
chunk, the block and the order of the sums are part of the norm's definition: a parameter's partials do not depend
on how parameters are grouped, flattened or launched. Non-finite is decided from the elements, never from an overflowed
sum: a chunk's sum of fp32 squares cannot overflow fp64, so it is finite exactly when its elements are; squares of fp64
gradients can, so there each element is looked at (11.6 instructions per bf16 element, where the sum takes 5.4).

Besides the 2-norm there are the 1-norm (sums of magnitudes) and the largest magnitude (NaN if there is one).
"""

import triton
import triton.language as tl

from . import memory
from .numerics import maximum
from .table import ALIGNED, FLAGS, NORM_INF, NORM_START, NORM_TWO, NUMEL, ROW_WIDTH


@triton.jit
def join(a, b, KIND: tl.constexpr):
    """Two partials of a norm as one; element by element."""
    return maximum(a, b) if KIND == NORM_INF else a + b


@triton.jit
def join_lanes(x, KIND: tl.constexpr):
    """One partial from those of all lanes."""
    if KIND == NORM_INF:
        found = tl.sum((x != x).to(tl.int32)) > 0  # a NaN is lost in tl.max
        return tl.where(found, float("nan"), tl.max(tl.where(x != x, 0.0, x)))
    else:
        return tl.sum(x)


@triton.jit
def root(x, KIND: tl.constexpr):
    """The norm, from all partials."""
    return tl.sqrt(x) if KIND == NORM_TWO else x


@triton.jit
def _accumulate(gradient, at, total, bad, GRAD: tl.constexpr, KIND: tl.constexpr, FULL: tl.constexpr):
    x = memory.load(gradient, at, GRAD, total.dtype, FULL)
    if GRAD == tl.float64:
        bad = bad | (tl.abs(x) < float("inf")).to(tl.int32) ^ 1
    return join(total, x * x if KIND == NORM_TWO else tl.abs(x), KIND), bad


@triton.jit
def store_partial(
    row, gradient, aligned, chunk, partials,
    GRAD: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial ``(sum of squares or as KIND says, > 0 if an element is inf or NaN)`` of one chunk of one gradient."""
    start = chunk * CHUNK
    left = tl.load(row + NUMEL) - start
    lanes = tl.arange(0, BLOCK)
    # the largest of narrow numbers needs no fp64, which has no instruction for it (20 an element where fp32 takes 3)
    total = tl.zeros((BLOCK,), tl.float32 if KIND == NORM_INF and GRAD != tl.float64 else tl.float64)
    bad = tl.zeros((BLOCK,), tl.int32)
    if (left >= CHUNK) & aligned:
        for o in range(0, CHUNK, BLOCK):
            total, bad = _accumulate(gradient, (start + o, lanes, lanes < BLOCK), total, bad, GRAD, KIND, True)
    else:
        rest = tl.minimum(left, CHUNK).to(tl.int32)
        done = rest * 0
        while done < rest:
            at = (start + done, lanes, done + lanes < rest)
            total, bad = _accumulate(gradient, at, total, bad, GRAD, KIND, False)
            done += BLOCK
    slot = partials + 2 * (tl.load(row + NORM_START) + chunk)
    square = join_lanes(total, KIND).to(tl.float64)
    tl.store(slot, square)
    if GRAD == tl.float64:
        tl.store(slot + 1, tl.sum(bad).to(tl.float64))
    else:
        tl.store(slot + 1, (tl.abs(square) < float("inf")).to(tl.float64) * -1.0 + 1.0)


@triton.jit
def norm_kernel(
    rows, grads, chunks, partials,
    GRAD: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partials of the chunks of all gradients of one dtype."""
    pid = tl.program_id(0)
    segment = tl.load(chunks + 2 * pid).to(tl.int64)
    chunk = tl.load(chunks + 2 * pid + 1).to(tl.int64)
    row = rows + segment * ROW_WIDTH
    aligned = (tl.load(row + FLAGS) & ALIGNED) != 0
    store_partial(row, tl.load(grads + segment), aligned, chunk, partials, GRAD, KIND, CHUNK, BLOCK)
