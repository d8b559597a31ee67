"""From the partials of the norm pass to norms: of each gradient, and of all of them, by a fixed tree.

Lane = chunk index within the parameter mod LANES, then parameters by the same tree: neither grouping nor launching
changes a bit.
"""

import triton
import triton.language as tl

from .norm import join, join_lanes, root
from .table import (
    LANES,
    MULTI,
    N_MULTI,
    N_SEGMENTS,
    NORM_COUNT,
    NORM_START,
    OWN_BAD,
    OWN_SQUARE,
    ROW_WIDTH,
    SCALAR_WIDTH,
    SQUARE,
)  # fmt: skip

_LANES = tl.constexpr(LANES)


@triton.jit
def total_norm(rows, partials, counts, scalars, KIND: tl.constexpr, LANES: tl.constexpr = _LANES):
    """Sum of squares (or as KIND says) and non-finite count over all segments.

    Segments of several partials leave their own sum in their scalar row.
    """
    lanes = tl.arange(0, LANES)
    n = tl.load(counts + N_SEGMENTS)
    total = tl.zeros((LANES,), tl.float64)
    bad = tl.zeros((LANES,), tl.float64)
    o = n * 0
    while o < n:  # segments of one chunk, LANES at a time: their sum is their only partial
        row = rows + (o + lanes) * ROW_WIDTH
        single = tl.load(row + NORM_COUNT, mask=o + lanes < n, other=0) == 1
        slot = partials + 2 * tl.load(row + NORM_START, mask=single, other=0)
        total = join(total, tl.load(slot, mask=single, other=0.0), KIND)
        bad += tl.load(slot + 1, mask=single, other=0.0)
        o += LANES
    i = n * 0
    many = tl.load(counts + N_MULTI)
    while i < many:
        segment = tl.load(counts + MULTI + i)
        row = rows + segment * ROW_WIDTH
        first, count = tl.load(row + NORM_START), tl.load(row + NORM_COUNT)
        own = tl.zeros((LANES,), tl.float64)
        o = count * 0
        while o < count:
            mask = o + lanes < count
            slot = partials + 2 * (first + o + lanes)
            own = join(own, tl.load(slot, mask=mask, other=0.0), KIND)
            bad += tl.load(slot + 1, mask=mask, other=0.0)
            o += LANES
        square = join_lanes(own, KIND)
        tl.store(scalars + segment * SCALAR_WIDTH + SQUARE, square)
        total = join(total, tl.where(lanes == segment % LANES, square, 0.0), KIND)
        i += 1
    return join_lanes(total, KIND), tl.sum(bad)


@triton.jit
def rounded(norm, wide):
    """A norm rounded once to fp32; left exact when ``wide`` or beyond fp32's range."""
    single = norm.to(tl.float32).to(tl.float64)
    return tl.where(wide, norm, tl.where(single == float("inf"), norm, single))  # not |: a float if interpreted


@triton.jit
def own_norm(row, out, partials, wide, mask, KIND: tl.constexpr):
    """Norm of each segment's gradient, as scaled."""
    count = tl.load(row + NORM_COUNT, mask=mask, other=0)
    first = partials + 2 * tl.load(row + NORM_START, mask=mask, other=0)
    square = tl.load(first, mask=count == 1, other=0.0) + tl.load(out + SQUARE, mask=count > 1, other=0.0)
    return rounded(root(square, KIND), wide)


@triton.jit
def clip(norm, limit):
    """What `torch.nn.utils.clip_grad_norm_` multiplies with: limit / (norm + 1e-6), at most 1; 1 without a limit."""
    ratio = limit / (norm + 1e-6)
    return tl.where(ratio >= 1.0, 1.0, tl.where(limit == float("inf"), 1.0, ratio))


@triton.jit
def totals_kernel(rows, scalars, partials, header, counts, KIND: tl.constexpr):
    """Sums over this table's gradients alone, for a norm over several tables."""
    square, bad = total_norm(rows, partials, counts, scalars, KIND)
    tl.store(header + OWN_SQUARE, square)
    tl.store(header + OWN_BAD, tl.where(bad > 0.0, 1.0, 0.0))
