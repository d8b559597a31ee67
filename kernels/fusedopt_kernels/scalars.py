"""Per-segment scalars on the device: step count, clip coefficient, skip, and the rule's own numbers.

All arithmetic is float64 with add, mul, div and sqrt only, so the eager twin on Python floats gives the same bits.
With a norm wanted, one program combines the norm's partials first; without, the grid covers the segments.
"""

import triton
import triton.language as tl

from .table import (
    CLIP_ALONE,
    CLIP_NORM,
    CLIP_VALUE,
    COEFFICIENT,
    DECAY,
    DECOUPLED,
    FLAGS,
    FOUND_INF,
    GRAD_SCALE,
    GROUP,
    HYPER_WIDTH,
    L1,
    L1_PENALTY,
    L2,
    LANES,
    LAST,
    LIMIT,
    LR,
    LR_INDEPENDENT,
    LR_INITIAL,
    MULTI,
    N_MULTI,
    N_SEGMENTS,
    NO_NORM,
    NONFINITE,
    NORM,
    NORM_COUNT,
    NORM_IS_FP64,
    NORM_START,
    OWN_BAD,
    OWN_DECAY,
    OWN_NORM,
    OWN_SQUARE,
    ROW_WIDTH,
    RULE_HYPERS,
    RULE_SCALARS,
    SCALAR_WIDTH,
    SKIP,
    SKIP_ABOVE,
    SKIP_NONFINITE,
    SKIPPED,
    SQUARE,
    STEP,
    STEP_IS_FP64,
    SUMMED_NORM,
    TOTAL_BAD,
    TOTAL_NORM,
    TOTAL_SQUARE,
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
def _rounded(norm, wide):
    """A norm rounded once to fp32; left exact when ``wide`` or beyond fp32's range."""
    single = norm.to(tl.float32).to(tl.float64)
    return tl.where(wide, norm, tl.where(single == float("inf"), norm, single))  # not |: a float if interpreted


@triton.jit
def _own_norm(row, out, partials, wide, mask):
    """Norm of each segment's gradient."""
    count = tl.load(row + NORM_COUNT, mask=mask, other=0)
    first = partials + 2 * tl.load(row + NORM_START, mask=mask, other=0)
    square = tl.load(first, mask=count == 1, other=0.0) + tl.load(out + SQUARE, mask=count > 1, other=0.0)
    return _rounded(tl.sqrt(square), wide)


@triton.jit
def _clip(norm, limit):
    """What `torch.nn.utils.clip_grad_norm_` multiplies with: limit / (norm + 1e-6), at most 1; 1 without a limit."""
    ratio = limit / (norm + 1e-6)
    return tl.where(ratio >= 1.0, 1.0, tl.where(limit == float("inf"), 1.0, ratio))


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
def _store_state(row, old, new, skip, mask, N: tl.constexpr):
    for i in tl.static_range(N):
        x = tl.where(skip, old[i], new[i])
        tagged = tl.load(row + LAST - i, mask=mask, other=0)
        is64 = (tagged & 1) != 0
        tl.store((tagged >> 1).to(tl.pointer_type(tl.float32), bitcast=True), x.to(tl.float32), mask & (is64 == 0))
        tl.store((tagged >> 1).to(tl.pointer_type(tl.float64), bitcast=True), x, mask & is64)


@triton.jit
def _segments(
    rows, hypers, addresses, scalars, partials, offset, n, inverse, norm, skip, wide,
    RULE: tl.constexpr, N_HYPERS: tl.constexpr, N_SCALARS: tl.constexpr, N_STATE: tl.constexpr,
    WITH_NORM: tl.constexpr, OWN_NORMS: tl.constexpr, GRAD_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the scalar rows of BLOCK segments from ``offset`` on, and renew their step counts and scalar slots.

    inverse: 1/loss scale. norm: of all gradients, unscaled.
    """
    segment = offset + tl.arange(0, BLOCK)
    mask = segment < n
    row, out = rows + segment * ROW_WIDTH, scalars + segment * SCALAR_WIDTH
    group = tl.load(row + GROUP, mask=mask, other=0)
    flags = tl.load(row + FLAGS, mask=mask, other=0)
    lr = _hyper(hypers, addresses, group, LR, mask)
    weight_decay = _hyper(hypers, addresses, group, WEIGHT_DECAY, mask)
    t = _next_step(tl.load(row + STEP, mask=mask, other=0), (flags & STEP_IS_FP64) != 0, skip, mask)
    coefficient = inverse + lr * 0.0
    own = coefficient
    if OWN_NORMS:
        own = _own_norm(row, out, partials, wide, mask) * inverse
    if WITH_NORM:
        clipped = norm + lr * 0.0
        if OWN_NORMS:
            clipped = tl.where((flags & CLIP_ALONE) != 0, own, clipped)
        coefficient = inverse * _clip(clipped, _hyper(hypers, addresses, group, CLIP_NORM, mask))
    hyper = (lr, weight_decay)
    for i in tl.static_range(N_HYPERS):
        hyper = hyper + (_hyper(hypers, addresses, group, RULE_HYPERS + i, mask),)
    if GRAD_NORM:
        state = _load_state(row, mask, N_STATE)
        s, new = RULE(hyper, t, state, own * (coefficient / inverse))
        _store_state(row, state, new, skip, mask, N_STATE)
    elif N_STATE > 0:
        state = _load_state(row, mask, N_STATE)
        s, new = RULE(hyper, t, state)
        _store_state(row, state, new, skip, mask, N_STATE)
    else:
        s = RULE(hyper, t)
    decoupled, rules = (flags & DECOUPLED) != 0, (flags & OWN_DECAY) != 0
    share = (s + (lr * weight_decay,))[N_SCALARS]
    relative = weight_decay * (lr / _hyper(hypers, addresses, group, LR_INITIAL, mask))
    share = tl.where((flags & LR_INDEPENDENT) != 0, relative, share)
    tl.store(out + COEFFICIENT, coefficient, mask=mask)
    tl.store(out + L2, tl.where(decoupled | rules, 0.0, weight_decay), mask=mask)
    tl.store(out + DECAY, tl.where(decoupled, share, 0.0), mask=mask)
    tl.store(out + SKIP, tl.where(skip, 1.0, lr * 0.0), mask=mask)
    tl.store(out + L1_PENALTY, _hyper(hypers, addresses, group, L1, mask), mask=mask)
    tl.store(out + LIMIT, _hyper(hypers, addresses, group, CLIP_VALUE, mask), mask=mask)
    for i in tl.static_range(N_SCALARS):
        tl.store(out + RULE_SCALARS + i, s[i], mask=mask)


@triton.jit
def _of_step(hypers, addresses, COLUMN: tl.constexpr):
    """A number of row 0."""
    one = tl.arange(0, 2)
    return tl.sum(tl.where(one == 0, _hyper(hypers, addresses, one.to(tl.int64) * 0, COLUMN, one == 0), 0.0))


@triton.jit
def totals_kernel(rows, scalars, partials, header, counts):
    """Sums of this table's gradients alone, for a norm over several tables."""
    square, bad = _total_norm(rows, partials, counts, scalars, _LANES)
    tl.store(header + OWN_SQUARE, square)
    tl.store(header + OWN_BAD, tl.where(bad > 0.0, 1.0, 0.0))


@triton.jit
def scalars_kernel(
    rows, hypers, addresses, scalars, partials, header, counts,
    RULE: tl.constexpr, N_HYPERS: tl.constexpr, N_SCALARS: tl.constexpr, N_STATE: tl.constexpr,
    NORM_MODE: tl.constexpr, SCALED: tl.constexpr, OWN_NORMS: tl.constexpr, GRAD_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Scalar rows of all segments. SCALED: row 0 holds a loss scale or a skip decision."""
    n = tl.load(counts + N_SEGMENTS)
    inverse = (n * 0 + 1).to(tl.float64)
    skip = n < 0
    if SCALED:  # in fp32, as torch.amp.GradScaler
        inverse = (1.0 / _of_step(hypers, addresses, GRAD_SCALE)).to(tl.float32).to(tl.float64)
        skip = _of_step(hypers, addresses, FOUND_INF) != 0.0
    if NORM_MODE == NO_NORM:
        _segments(
            rows, hypers, addresses, scalars, partials, tl.program_id(0).to(tl.int64) * BLOCK, n,
            inverse, inverse, skip, n < 0,
            RULE, N_HYPERS, N_SCALARS, N_STATE, False, False, False, BLOCK,
        )  # fmt: skip
        tl.store(header + SKIPPED, tl.where(skip, 1.0, 0.0))
    else:
        wide = tl.load(header + NORM_IS_FP64) != 0.0
        if NORM_MODE == OWN_NORM:
            square, bad = _total_norm(rows, partials, counts, scalars, _LANES)
            if OWN_NORMS:
                tl.debug_barrier()  # sums stored by some threads above are loaded by others below
            norm = _rounded(tl.sqrt(square), wide) * inverse
        elif NORM_MODE == SUMMED_NORM:
            bad = _of_step(hypers, addresses, TOTAL_BAD)
            norm = _rounded(tl.sqrt(_of_step(hypers, addresses, TOTAL_SQUARE)), wide) * inverse
        else:
            norm = _of_step(hypers, addresses, TOTAL_NORM)
            bad = tl.where(tl.abs(norm) < float("inf"), 0.0, 1.0)
        above = _of_step(hypers, addresses, SKIP_ABOVE)
        refused = (bad > 0.0) & (_of_step(hypers, addresses, SKIP_NONFINITE) != 0.0)
        spike = (above < float("inf")) & ((norm <= above) == 0)
        skip = skip | refused | spike
        tl.store(header + NORM, norm)
        tl.store(header + NONFINITE, tl.where(bad > 0.0, 1.0, 0.0))
        tl.store(header + SKIPPED, tl.where(skip, 1.0, 0.0))
        offset = n * 0
        while offset < n:
            _segments(
                rows, hypers, addresses, scalars, partials, offset, n, inverse, norm, skip, wide,
                RULE, N_HYPERS, N_SCALARS, N_STATE, True, OWN_NORMS, GRAD_NORM, BLOCK,
            )  # fmt: skip
            offset += BLOCK
