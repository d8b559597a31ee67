"""Per-segment scalars on the device: step count, clip coefficient, skip, and the rule's own numbers.

All arithmetic is float64 with add, mul, div and sqrt only, so the eager twin on Python floats gives the same bits.
With a norm wanted, one program combines the norm's partials first; without, the grid covers the segments.
"""

import triton
import triton.language as tl

from .table import (
    COEFFICIENT,
    DECAY,
    DECOUPLED,
    FLAGS,
    GROUP,
    HYPER_WIDTH,
    L2,
    LANES,
    LAST,
    LR,
    MAX_NORM,
    MULTI,
    N_MULTI,
    N_SEGMENTS,
    NONFINITE,
    NORM,
    NORM_COUNT,
    NORM_IS_FP64,
    NORM_START,
    OWN_DECAY,
    ROW_WIDTH,
    RULE_HYPERS,
    RULE_SCALARS,
    SCALAR_WIDTH,
    SKIP,
    SKIP_NONFINITE,
    SQUARE,
    STEP,
    STEP_IS_FP64,
    WEIGHT_DECAY,
)  # fmt: skip

_LANES = tl.constexpr(LANES)


@triton.jit
def _hyper(hypers, addresses, group, COLUMN: tl.constexpr, mask):
    """Hyper-parameter of each segment: the uploaded float, or what a tensor of the user's holds right now."""
    at = group * HYPER_WIDTH + COLUMN
    value = tl.load(hypers + at, mask=mask, other=0.0)
    tagged = tl.load(addresses + at, mask=mask, other=0)
    p32 = (tagged >> 1).to(tl.pointer_type(tl.float32), bitcast=True)
    p64 = (tagged >> 1).to(tl.pointer_type(tl.float64), bitcast=True)
    is32, is64 = (tagged != 0) & ((tagged & 1) == 0), (tagged & 1) != 0
    value = tl.where(is32, tl.load(p32, mask=is32, other=0.0).to(tl.float64), value)
    return tl.where(is64, tl.load(p64, mask=is64, other=0.0), value)


@triton.jit
def _next_step(address, is64, skip, mask):
    """Step count of each segment after this step; written back unless the step is skipped."""
    p32 = address.to(tl.pointer_type(tl.float32), bitcast=True)
    p64 = address.to(tl.pointer_type(tl.float64), bitcast=True)
    m32, m64 = mask & (address != 0) & (is64 == 0), mask & (address != 0) & is64
    t = tl.load(p32, mask=m32, other=0.0).to(tl.float64) + tl.load(p64, mask=m64, other=0.0)
    t = tl.where(skip, t, t + 1.0)
    tl.store(p32, t.to(tl.float32), mask=m32)
    tl.store(p64, t, mask=m64)
    return t


@triton.jit
def _total_norm(rows, partials, counts, scalars, LANES: tl.constexpr):
    """Sum of squares and non-finite count over all segments: a fixed tree per segment, then over segments.

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
        total += tl.load(slot, mask=single, other=0.0)
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
            own += tl.load(slot, mask=mask, other=0.0)
            bad += tl.load(slot + 1, mask=mask, other=0.0)
            o += LANES
        square = tl.sum(own)
        tl.store(scalars + segment * SCALAR_WIDTH + SQUARE, square)
        total += tl.where(lanes == segment % LANES, square, 0.0)
        i += 1
    return tl.sum(total), tl.sum(bad)


@triton.jit
def _grad_norm(row, out, partials, coefficient, exact, mask):
    """Norm of each segment's transformed gradient, rounded once to fp32 unless ``exact``."""
    count = tl.load(row + NORM_COUNT, mask=mask, other=0)
    first = partials + 2 * tl.load(row + NORM_START, mask=mask, other=0)
    square = tl.load(first, mask=count == 1, other=0.0) + tl.load(out + SQUARE, mask=count > 1, other=0.0)
    norm = tl.sqrt(square)
    single = norm.to(tl.float32).to(tl.float64)
    return tl.where(exact | (single == float("inf")), norm, single) * coefficient


@triton.jit
def _load_state(row, mask, N: tl.constexpr):
    """Scalar slots of each segment, as float64."""
    state = ()
    for i in tl.static_range(N):
        tagged = tl.load(row + LAST - i, mask=mask, other=0)
        p32 = (tagged >> 1).to(tl.pointer_type(tl.float32), bitcast=True)
        p64 = (tagged >> 1).to(tl.pointer_type(tl.float64), bitcast=True)
        is64 = (tagged & 1) != 0
        x = tl.load(p32, mask=mask & (is64 == 0), other=0.0).to(tl.float64)
        state = state + (tl.where(is64, tl.load(p64, mask=mask & is64, other=0.0), x),)
    return state


@triton.jit
def _store_state(row, new, mask, N: tl.constexpr):
    for i in tl.static_range(N):
        tagged = tl.load(row + LAST - i, mask=mask, other=0)
        is64 = (tagged & 1) != 0
        tl.store((tagged >> 1).to(tl.pointer_type(tl.float32), bitcast=True), new[i].to(tl.float32), mask & (is64 == 0))
        tl.store((tagged >> 1).to(tl.pointer_type(tl.float64), bitcast=True), new[i], mask & is64)


@triton.jit
def _segments(
    rows, hypers, addresses, scalars, partials, offset, n, coefficient, skip, exact,
    RULE: tl.constexpr, N_HYPERS: tl.constexpr, N_SCALARS: tl.constexpr, N_STATE: tl.constexpr,
    GRAD_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the scalar rows of BLOCK segments from ``offset`` on, and renew their step counts and scalar slots."""
    segment = offset + tl.arange(0, BLOCK)
    mask = segment < n
    row, out = rows + segment * ROW_WIDTH, scalars + segment * SCALAR_WIDTH
    group = tl.load(row + GROUP, mask=mask, other=0)
    flags = tl.load(row + FLAGS, mask=mask, other=0)
    lr = _hyper(hypers, addresses, group, LR, mask)
    weight_decay = _hyper(hypers, addresses, group, WEIGHT_DECAY, mask)
    t = _next_step(tl.load(row + STEP, mask=mask, other=0), (flags & STEP_IS_FP64) != 0, skip, mask)
    hyper = (lr, weight_decay)
    for i in tl.static_range(N_HYPERS):
        hyper = hyper + (_hyper(hypers, addresses, group, RULE_HYPERS + i, mask),)
    if GRAD_NORM:
        norm = _grad_norm(row, out, partials, coefficient, exact, mask)
        s, new = RULE(hyper, t, _load_state(row, mask, N_STATE), norm)
        _store_state(row, new, mask & (skip == 0), N_STATE)
    elif N_STATE > 0:
        s, new = RULE(hyper, t, _load_state(row, mask, N_STATE))
        _store_state(row, new, mask & (skip == 0), N_STATE)
    else:
        s = RULE(hyper, t)
    decoupled, own = (flags & DECOUPLED) != 0, (flags & OWN_DECAY) != 0
    tl.store(out + COEFFICIENT, coefficient + lr * 0.0, mask=mask)
    tl.store(out + L2, tl.where(decoupled | own, 0.0, weight_decay), mask=mask)
    tl.store(out + DECAY, tl.where(decoupled, (s + (lr * weight_decay,))[N_SCALARS], 0.0), mask=mask)
    tl.store(out + SKIP, tl.where(skip, 1.0, lr * 0.0), mask=mask)
    for i in tl.static_range(N_SCALARS):
        tl.store(out + RULE_SCALARS + i, s[i], mask=mask)


@triton.jit
def scalars_kernel(
    rows, hypers, addresses, scalars, partials, header, counts,
    RULE: tl.constexpr, N_HYPERS: tl.constexpr, N_SCALARS: tl.constexpr, N_STATE: tl.constexpr,
    WITH_NORM: tl.constexpr, GRAD_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.load(counts + N_SEGMENTS)
    if WITH_NORM:
        square, bad = _total_norm(rows, partials, counts, scalars, _LANES)
        if GRAD_NORM:
            tl.debug_barrier()  # sums stored by some threads above are loaded by others below
        exact = tl.sqrt(square)
        norm = exact.to(tl.float32).to(tl.float64)
        wide = tl.load(header + NORM_IS_FP64) != 0.0
        norm = tl.where(wide | (norm == float("inf")), exact, norm)  # beyond fp32's range stay exact
        tl.store(header + NORM, norm)
        tl.store(header + NONFINITE, tl.where(bad > 0.0, 1.0, 0.0))
        # torch.nn.utils.clip_grad_norm_: max_norm / (norm + 1e-6), at most 1; no threshold is an infinite one
        limit = tl.load(header + MAX_NORM)
        ratio = limit / (norm + 1e-6)
        coefficient = tl.where((ratio >= 1.0) | (limit == float("inf")), 1.0, ratio)
        skip = (bad > 0.0) & (tl.load(header + SKIP_NONFINITE) != 0.0)
        offset = n * 0
        while offset < n:
            _segments(
                rows, hypers, addresses, scalars, partials, offset, n, coefficient, skip, wide,
                RULE, N_HYPERS, N_SCALARS, N_STATE, GRAD_NORM, BLOCK,
            )  # fmt: skip
            offset += BLOCK
    else:
        one = (n * 0 + 1).to(tl.float64)
        _segments(
            rows, hypers, addresses, scalars, partials, tl.program_id(0).to(tl.int64) * BLOCK, n, one, n < 0, n < 0,
            RULE, N_HYPERS, N_SCALARS, N_STATE, False, BLOCK,
        )  # fmt: skip
