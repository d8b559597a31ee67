"""Sums of squares over the chunks of a segment: what two-pass rules, cautious steps and metrics need.

fp64 in every lane, one partial per chunk, then a fixed tree, so that no bit depends on how kernels are launched.
"""

import triton
import triton.language as tl

from .table import CHANGE, NUMEL, PARAM, RESIDUAL


@triton.jit
def zeros(N: tl.constexpr, BLOCK: tl.constexpr):
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros((BLOCK,), tl.float64),)
    return sums


@triton.jit
def add_squares(sums, values, at):
    """Squares of some values of a block, added up lane by lane."""
    new = ()
    for i in tl.static_range(len(sums)):
        x = tl.where(at[2], values[i], 0.0).to(tl.float64)
        new = new + (sums[i] + x * x,)
    return new


@triton.jit
def store_sums(out, sums):
    for i in tl.static_range(len(sums)):
        tl.store(out + i, tl.sum(sums[i]))


@triton.jit
def sum_of_squares(partials, first, count, stride, LANES: tl.constexpr):
    """Fixed tree over a segment's partials: lane = index mod LANES, then one sum over the lanes."""
    lanes = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float64)
    done = first * 0
    while done < count:
        total += tl.load(partials + (first + done + lanes) * stride, mask=done + lanes < count, other=0.0)
        done += LANES
    return tl.sum(total)


@triton.jit
def change_of(row, chunk):
    """Where a chunk's sums of squares of its weights and of their change go."""
    return tl.load(row + CHANGE).to(tl.pointer_type(tl.float64), bitcast=True) + 2 * chunk


@triton.jit
def measure_unchanged(
    row, chunk, WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """Squares of the weights of one chunk in a skipped step, which reads nothing else; their change is 0."""
    few = tl.arange(0, TAIL)
    param, residual = tl.load(row + PARAM), tl.load(row + RESIDUAL)
    start = chunk * CHUNK
    rest = tl.minimum(tl.load(row + NUMEL) - start, CHUNK).to(tl.int32)
    done = rest * 0
    total = zeros(1, TAIL)
    while done < rest:
        at = (start + done, few, done + few < rest)
        total = add_squares(total, (WEIGHT[0](param, residual, at, WEIGHT[2], COMPUTE, False),), at)
        done += TAIL
    store_sums(change_of(row, chunk), total + zeros(1, TAIL))
