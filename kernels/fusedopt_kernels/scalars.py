"""Per-segment scalars on the device: step count, clip coefficient, skip, and the rule's own numbers.

All arithmetic is float64 with add, mul, div and sqrt only, so the eager twin on Python floats gives the same bits.
With a norm wanted, one program combines the norm's partials first; without, the grid covers the segments.
"""

import triton
import triton.language as tl

from .average import store_ema_weight
from .hyper import hyper_of, load_number, number_of, store_number
from .norm import root
from .table import (
    CHECK,
    CLIP,
    CLIP_ALONE,
    CLIP_NORM,
    CLIP_VALUE,
    CLIPPED,
    COEFFICIENT,
    COUNT,
    COUNTED,
    DECAY,
    DECOUPLED,
    FLAGS,
    FOUND,
    FOUND_INF,
    GRAD_SCALE,
    GRADIENT_NORM,
    GROUP,
    L1,
    L1_PENALTY,
    L2,
    LAST,
    LIMIT,
    LR,
    LR_INDEPENDENT,
    LR_INITIAL,
    N_SEGMENTS,
    NO_NORM,
    NONFINITE,
    NONFINITE_STEPS,
    NORM,
    NORM_IS_FP64,
    OWN_DECAY,
    OWN_NORM,
    ROW_WIDTH,
    RULE_HYPERS,
    RULE_SCALARS,
    SCALAR_WIDTH,
    SKIP,
    SKIP_ABOVE,
    SKIP_NONFINITE,
    SKIPPED,
    SKIPPED_STEPS,
    STEP,
    STEP_IS_FP64,
    STEPS,
    SUMMED_NORM,
    TALLY,
    TALLY_WIDTH,
    TOTAL_BAD,
    TOTAL_NORM,
    TOTAL_SQUARE,
    WEIGHT_DECAY,
)  # fmt: skip
from .total import clip, own_norm, rounded, total_norm


@triton.jit
def _next_step(address, flags, skip, mask):
    """Step count of each segment after this step; written back unless the step is skipped."""
    tagged = (address << 1) | ((flags & STEP_IS_FP64) != 0).to(tl.int64)
    here = mask & (address != 0)
    t = load_number(tagged, here)
    t = tl.where(skip, t, tl.where((flags & COUNTED) != 0, t, t + 1.0))
    store_number(tagged, t, here)
    return t


@triton.jit
def _load_state(row, mask, N: tl.constexpr):
    """Scalar slots of each segment, as float64."""
    state = ()
    for i in tl.static_range(N):
        state = state + (load_number(tl.load(row + LAST - i, mask=mask, other=0), mask),)
    return state


@triton.jit
def _store_state(row, old, new, skip, mask, N: tl.constexpr):
    for i in tl.static_range(N):
        store_number(tl.load(row + LAST - i, mask=mask, other=0), tl.where(skip, old[i], new[i]), mask)


@triton.jit
def _segments(
    rows, hypers, addresses, scalars, partials, offset, n, inverse, norm, skip, wide,
    RULE: tl.constexpr, N_HYPERS: tl.constexpr, N_SCALARS: tl.constexpr, N_STATE: tl.constexpr, KIND: tl.constexpr,
    WITH_NORM: tl.constexpr, OWN_NORMS: tl.constexpr, GRAD_NORM: tl.constexpr, EMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the scalar rows of BLOCK segments from ``offset`` on, and renew their step counts and scalar slots.

    inverse: 1/loss scale. norm: of all gradients, unscaled. Returns the smallest clip coefficient.
    """
    segment = offset + tl.arange(0, BLOCK)
    mask = segment < n
    row, out = rows + segment * ROW_WIDTH, scalars + segment * SCALAR_WIDTH
    group = tl.load(row + GROUP, mask=mask, other=0)
    flags = tl.load(row + FLAGS, mask=mask, other=0)
    lr = hyper_of(hypers, addresses, group, LR, mask)
    weight_decay = hyper_of(hypers, addresses, group, WEIGHT_DECAY, mask)
    t = _next_step(tl.load(row + STEP, mask=mask, other=0), flags, skip, mask)
    zero = tl.zeros((BLOCK,), tl.float64)  # not lr·0: lr may be inf
    coefficient = inverse + zero
    own = coefficient
    share = zero + 1.0
    if OWN_NORMS:
        own = own_norm(row, out, partials, wide, mask, KIND) * inverse
        tl.store(out + GRADIENT_NORM, own, mask=mask)
    if WITH_NORM:
        clipped = norm + zero
        if OWN_NORMS:
            clipped = tl.where((flags & CLIP_ALONE) != 0, own, clipped)
        share = clip(clipped, hyper_of(hypers, addresses, group, CLIP_NORM, mask))
        coefficient = inverse * share
        tl.store(out + CLIP, share, mask=mask)
    lowest = tl.min(tl.where(mask, share, 1.0))  # NaN is left out
    hyper = (lr, weight_decay)
    for i in tl.static_range(N_HYPERS):
        hyper = hyper + (hyper_of(hypers, addresses, group, RULE_HYPERS + i, mask),)
    if GRAD_NORM:
        state = _load_state(row, mask, N_STATE)
        s, new = RULE(hyper, t, state, own * share)
        _store_state(row, state, new, skip, mask, N_STATE)
    elif N_STATE > 0:
        state = _load_state(row, mask, N_STATE)
        s, new = RULE(hyper, t, state)
        _store_state(row, state, new, skip, mask, N_STATE)
    else:
        s = RULE(hyper, t)
    decoupled, rules = (flags & DECOUPLED) != 0, (flags & OWN_DECAY) != 0
    taken = (s + (lr * weight_decay,))[N_SCALARS]
    relative = weight_decay * (lr / hyper_of(hypers, addresses, group, LR_INITIAL, mask))
    taken = tl.where((flags & LR_INDEPENDENT) != 0, relative, taken)
    tl.store(out + COEFFICIENT, coefficient, mask=mask)
    tl.store(out + COUNT, t, mask=mask)
    tl.store(out + L2, tl.where(decoupled | rules, 0.0, weight_decay), mask=mask)
    tl.store(out + DECAY, tl.where(decoupled, taken, 0.0), mask=mask)
    tl.store(out + SKIP, tl.where(skip, 1.0, zero), mask=mask)
    tl.store(out + L1_PENALTY, hyper_of(hypers, addresses, group, L1, mask), mask=mask)
    tl.store(out + LIMIT, hyper_of(hypers, addresses, group, CLIP_VALUE, mask), mask=mask)
    for i in tl.static_range(N_SCALARS):
        tl.store(out + RULE_SCALARS + i, s[i], mask=mask)
    if EMA:
        store_ema_weight(row, out, hypers, addresses, group, skip, mask)
    return lowest


@triton.jit
def _count(condition_addresses, skip, lowest, bad):
    """Renew the running counts: see ``table.py``. lowest: smallest clip coefficient; bad: count of non-finite."""
    address = tl.load(condition_addresses + TALLY)
    lane = tl.arange(0, TALLY_WIDTH)
    counts = address.to(tl.pointer_type(tl.float64), bitcast=True) + lane
    more = tl.where(lane == STEPS, 1.0, 0.0)
    more += tl.where(lane == CLIPPED, tl.where(skip, 0.0, tl.where(lowest < 1.0, 1.0, 0.0)), 0.0)
    more += tl.where(lane == SKIPPED_STEPS, tl.where(skip, 1.0, 0.0), 0.0)
    more += tl.where(lane == NONFINITE_STEPS, tl.where(bad > 0.0, 1.0, 0.0), 0.0)
    here = tl.where(address != 0, lane, TALLY_WIDTH) < TALLY_WIDTH  # not &: no mask if interpreted
    tl.store(counts, tl.load(counts, mask=here, other=0.0) + more, mask=here)


@triton.jit
def _found(header, bad):
    """Whether gradients hold inf or NaN, as fp64 and as fp32."""
    flag = tl.where(bad > 0.0, 1.0, 0.0)
    tl.store(header + NONFINITE, flag)
    tl.store((header + FOUND).to(tl.pointer_type(tl.float32), bitcast=True), flag.to(tl.float32))


@triton.jit
def _norm(
    rows, conditions, condition_addresses, scalars, partials, counts, inverse, wide,
    NORM_MODE: tl.constexpr, KIND: tl.constexpr, OWN_NORMS: tl.constexpr,
):  # fmt: skip
    """(norm of all gradients, unscaled; count of non-finite)."""
    if NORM_MODE == OWN_NORM:
        square, bad = total_norm(rows, partials, counts, scalars, KIND)
        if OWN_NORMS:
            tl.debug_barrier()  # sums stored by some threads above are loaded by others below
        norm = rounded(root(square, KIND), wide) * inverse
    elif NORM_MODE == SUMMED_NORM:
        bad = number_of(conditions, condition_addresses, TOTAL_BAD)
        norm = rounded(root(number_of(conditions, condition_addresses, TOTAL_SQUARE), KIND), wide) * inverse
    else:
        norm = number_of(conditions, condition_addresses, TOTAL_NORM)
        bad = tl.where(tl.abs(norm) < float("inf"), 0.0, 1.0)
    return norm, bad


@triton.jit
def scalars_kernel(
    rows, hypers, addresses, conditions, condition_addresses, scalars, partials, header, counts,
    RULE: tl.constexpr, N_HYPERS: tl.constexpr, N_SCALARS: tl.constexpr, N_STATE: tl.constexpr,
    NORM_MODE: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr, OWN_NORMS: tl.constexpr,
    GRAD_NORM: tl.constexpr, EMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scalar rows of all segments. SCALED: the conditions hold a loss scale or a skip decision."""
    n = tl.load(counts + N_SEGMENTS)
    inverse = (n * 0 + 1).to(tl.float64)
    skip = n < 0
    if SCALED:  # in fp32, as torch.amp.GradScaler
        inverse = (1.0 / number_of(conditions, condition_addresses, GRAD_SCALE)).to(tl.float32).to(tl.float64)
        skip = number_of(conditions, condition_addresses, FOUND_INF) != 0.0
    if NORM_MODE == NO_NORM:
        pid = tl.program_id(0)
        _segments(
            rows, hypers, addresses, scalars, partials, pid.to(tl.int64) * BLOCK, n, inverse, inverse, skip, n < 0,
            RULE, N_HYPERS, N_SCALARS, N_STATE, KIND, False, False, False, EMA, BLOCK,
        )  # fmt: skip
        tl.store(header + SKIPPED, tl.where(skip, 1.0, 0.0))
        if pid == 0:
            _count(condition_addresses, skip, inverse * 0.0 + 1.0, inverse * 0.0)
    else:
        wide = tl.load(header + NORM_IS_FP64) != 0.0
        norm, bad = _norm(
            rows, conditions, condition_addresses, scalars, partials, counts, inverse, wide, NORM_MODE, KIND, OWN_NORMS
        )
        above = number_of(hypers, addresses, SKIP_ABOVE)
        asked = number_of(hypers, addresses, SKIP_NONFINITE) + number_of(conditions, condition_addresses, CHECK)
        refused = (bad > 0.0) & (asked != 0.0)
        spike = (above < float("inf")) & ((norm <= above) == 0)
        skip = skip | refused | spike
        tl.store(header + NORM, norm)
        tl.store(header + SKIPPED, tl.where(skip, 1.0, 0.0))
        _found(header, bad)
        lowest = inverse * 0.0 + 1.0
        offset = n * 0
        while offset < n:
            block = _segments(
                rows, hypers, addresses, scalars, partials, offset, n, inverse, norm, skip, wide,
                RULE, N_HYPERS, N_SCALARS, N_STATE, KIND, True, OWN_NORMS, GRAD_NORM, EMA, BLOCK,
            )  # fmt: skip
            lowest = tl.where(block < lowest, block, lowest)
            offset += BLOCK
        _count(condition_addresses, skip, lowest, bad)
