"""The weight average: its weight in a step, and a pass of its own where no update kernel writes it.

n counts the steps averaged so far. The average of step 0 is the value itself; later

    ema ← ema + (1 − decay_n)·(p − ema)        decay_n = decay, or min(decay, (1 + n)/(10 + n)) while warming up

with p what the parameter's format holds after the step. The update kernel does this to what it updates; parameters
without a gradient, with a sparse one or under a matrix rule take the two kernels below, after all updates.
"""

import triton
import triton.language as tl

from . import memory
from .hyper import hyper_of, load_number, store_number
from .numerics import average, average_eager, average_weight, average_weight_eager
from .table import (
    ALIGNED,
    EMA,
    EMA_DECAY,
    EMA_STEP,
    EMA_WARMUP,
    EMA_WEIGHT,
    FLAGS,
    GROUP,
    N_SEGMENTS,
    NUMEL,
    PARAM,
    RESIDUAL,
    ROW_WIDTH,
    SCALAR_WIDTH,
    SKIP,
)  # fmt: skip


@triton.jit
def ema_weight(decay, warmup, count):
    """Weight of the new value for `renew`, in float64; 0 (the new value alone) when nothing was averaged before."""
    ramp = tl.minimum(decay, (1.0 + count) / (10.0 + count))
    weight = average_weight(1.0 - tl.where(warmup != 0.0, ramp, decay))
    return tl.where(count == 0.0, 0.0, weight)


def ema_weight_eager(decay: float, warmup: float, count: float) -> float:
    """Eager twin of `ema_weight`."""
    ramp = min(decay, (1.0 + count) / (10.0 + count))
    weight = average_weight_eager(1.0 - (ramp if warmup != 0.0 else decay))
    return 0.0 if count == 0.0 else weight


@triton.jit
def renew(old, new, w):
    """The average with a new value. Weight 0 gives the value bit for bit, whatever the average held, NaN too."""
    return tl.where(w == 0.0, new, average(old, new, w))


def renew_eager(old, new, w: float):
    """Eager twin of `renew` (works on anything with arithmetic)."""
    return new if w == 0.0 else average_eager(old, new, w)


@triton.jit
def store_ema_weight(row, out, hypers, addresses, group, skip, mask):
    """Weight of the new value in each segment's average; the averaged step is counted unless it is skipped."""
    tagged = tl.load(row + EMA_STEP, mask=mask, other=0)
    here = mask & (tagged != 0)
    n = load_number(tagged, here)
    decay = hyper_of(hypers, addresses, group, EMA_DECAY, here)
    warmup = hyper_of(hypers, addresses, group, EMA_WARMUP, here)
    tl.store(out + EMA_WEIGHT, ema_weight(decay, warmup, n), mask=here)
    store_number(tagged, tl.where(skip, n, n + 1.0), here)


@triton.jit
def average_scalars_kernel(rows, hypers, addresses, scalars, skipped, counts, BLOCK: tl.constexpr):
    """Scalar rows of BLOCK segments that are averaged in a pass of their own. skipped: not 0 when the step was."""
    segment = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = segment < tl.load(counts + N_SEGMENTS)
    row, out = rows + segment * ROW_WIDTH, scalars + segment * SCALAR_WIDTH
    skip = tl.load(skipped) != 0.0
    tl.store(out + SKIP, tl.where(skip, 1.0, 0.0), mask=mask)
    store_ema_weight(row, out, hypers, addresses, tl.load(row + GROUP, mask=mask, other=0), skip, mask)


@triton.jit
def _average_block(param, residual, ema, w, at, WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    p = WEIGHT[0](param, residual, at, WEIGHT[2], COMPUTE, FULL)
    old = memory.load(ema, at, COMPUTE, COMPUTE, FULL)
    memory.store(ema, at, renew(old, p, w), COMPUTE, FULL)


@triton.jit
def average_kernel(
    rows, chunks, scalars,
    WEIGHT: tl.constexpr, COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Average one chunk: 8 bytes per element of an fp32 average read and written, beside the parameter's read."""
    pid = tl.program_id(0)
    segment = tl.load(chunks + 2 * pid).to(tl.int64)
    row, srow = rows + segment * ROW_WIDTH, scalars + segment * SCALAR_WIDTH
    if tl.load(srow + SKIP) == 0.0:
        w = tl.load(srow + EMA_WEIGHT).to(COMPUTE)
        param, residual, ema = tl.load(row + PARAM), tl.load(row + RESIDUAL), tl.load(row + EMA)
        start = tl.load(chunks + 2 * pid + 1).to(tl.int64) * CHUNK
        left = tl.load(row + NUMEL) - start
        if (left >= CHUNK) & ((tl.load(row + FLAGS) & ALIGNED) != 0):
            lanes = tl.arange(0, BLOCK)
            for o in range(0, CHUNK, BLOCK):
                at = (start + o, lanes, lanes < BLOCK)
                _average_block(param, residual, ema, w, at, WEIGHT, COMPUTE, True)
        else:
            few = tl.arange(0, TAIL)
            rest = tl.minimum(left, CHUNK).to(tl.int32)
            done = rest * 0
            while done < rest:
                at = (start + done, few, done + few < rest)
                _average_block(param, residual, ema, w, at, WEIGHT, COMPUTE, False)
                done += TAIL
