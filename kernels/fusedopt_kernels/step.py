"""The one update kernel: chunk → load → gradient transforms → RULE → decay → one rounding → store.

A program walks one chunk of one segment. Which rule, formats and transforms it uses are compile-time arguments:
plain tuples of jit functions and types, composed and never enumerated. Every number comes from the tables.
Full chunks of aligned segments take an unmasked path with 128-bit accesses; all others a masked, coalesced one in
blocks of another size: with equal sizes the compiler shares layouts between both and adds barriers to the tail.

SWITCHES is what may be laid around any rule: ``(cautious, cautious decay, masked, averaged, measured)``. An averaged
weight has a running average beside it; of a measured one the squares of its new value and of its change are summed.
"""

import triton
import triton.language as tl

from . import memory, place
from .average import renew
from .numerics import sign
from .sums import add_squares, change_of, measure_unchanged, store_sums, sum_of_squares, zeros
from .table import (
    ALIGNED,
    COEFFICIENT,
    DECAY,
    EMA,
    EMA_WEIGHT,
    FLAGS,
    KEYS,
    L1_PENALTY,
    L2,
    LANES,
    LIMIT,
    MASK,
    MEASURE_COUNT,
    MEASURE_START,
    PARAM,
    RESIDUAL,
    ROW_WIDTH,
    RULE_SCALARS,
    SCALAR_WIDTH,
    SKIP,
    SLOTS,
    WEIGHT_KEY,
    WHOLE_NUMEL,
)  # fmt: skip

_LANES = tl.constexpr(LANES)


@triton.jit
def load_scalars(row, N: tl.constexpr, COMPUTE: tl.constexpr):
    s = ()
    for i in tl.static_range(N):
        s = s + (tl.load(row + RULE_SCALARS + i).to(COMPUTE),)
    return s


@triton.jit
def load_row(row, gradient, N_STATES: tl.constexpr):
    """What the blocks of a chunk share: (flags, gradient, parameter, residual, mask, average, values and scales of
    slots)."""
    r = (tl.load(row + FLAGS), gradient, tl.load(row + PARAM), tl.load(row + RESIDUAL), tl.load(row + MASK))
    r = r + (tl.load(row + EMA),)
    for i in tl.static_range(2 * N_STATES):
        r = r + (tl.load(row + SLOTS + i),)
    return r


@triton.jit
def _inputs(
    r, e, at, at_g,
    WEIGHT: tl.constexpr, STATES: tl.constexpr, TRANSFORMS: tl.constexpr,
    GRAD: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Transformed gradient, parameter and state values of one block; the gradient may lie elsewhere (sparse)."""
    g = memory.load(r[1], at_g, GRAD, COMPUTE, FULL)
    p = WEIGHT[0](r[2], r[3], at, WEIGHT[2], COMPUTE, FULL)
    states = ()
    for i in tl.static_range(len(STATES)):
        states = states + (STATES[i][0](r[6 + 2 * i], r[7 + 2 * i], at, STATES[i][2], COMPUTE, FULL),)
    for i in tl.static_range(len(TRANSFORMS)):
        g = TRANSFORMS[i](g, p, r[0], e)
    return g, p, states


@triton.jit
def agrees(a, b):
    """Whether both are non-zero and of one sign; products of small numbers would underflow."""
    return sign(a) * sign(b) > 0


@triton.jit
def all_draws(row, srow, WEIGHT: tl.constexpr, STATES: tl.constexpr):
    """`place.draws` of the weight and of every slot."""
    d = (place.draws(row, srow, WEIGHT_KEY, WEIGHT[3]),)
    for i in tl.static_range(len(STATES)):
        d = d + (place.draws(row, srow, KEYS + i, STATES[i][3]),)
    return d


@triton.jit
def update_block(
    r, e, s, d, at, at_g, sums,
    RULE: tl.constexpr, VARIANT: tl.constexpr, WEIGHT: tl.constexpr, STATES: tl.constexpr,
    TRANSFORMS: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr,
    SWITCHES: tl.constexpr, BY_EIGHT: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Update one block; returns ``sums`` with its own added, where the step is measured."""
    g, p, states = _inputs(r, e, at, at_g, WEIGHT, STATES, TRANSFORMS, GRAD, COMPUTE, FULL)
    descent, new = RULE(g, p, states, s, VARIANT, EXACT)
    if SWITCHES[0]:
        descent = tl.where(agrees(descent, g), descent * e[5], descent * 0.0)  # NaN stays NaN
    total = tl.where(e[2] != 0.0, descent + e[2] * p, descent)
    if SWITCHES[1]:
        total = tl.where(agrees(descent, 0.0 - p), descent, total)
    x = p - total
    if SWITCHES[2]:
        x = tl.where(memory.load(r[4], at, tl.int8, tl.int32, FULL) != 0, x, p)
    held = WEIGHT[1](r[2], r[3], at, x, place.noise(d[0], at, WEIGHT[3], BY_EIGHT), WEIGHT[2], WEIGHT[3], FULL)
    if SWITCHES[3]:
        memory.store(r[5], at, renew(memory.load(r[5], at, COMPUTE, COMPUTE, FULL), held, e[6]), COMPUTE, FULL)
    for i in tl.static_range(len(STATES)):
        noise = place.noise(d[1 + i], at, STATES[i][3], BY_EIGHT)
        STATES[i][1](r[6 + 2 * i], r[7 + 2 * i], at, new[i], noise, STATES[i][2], STATES[i][3], FULL)
    if SWITCHES[4]:
        return add_squares(sums, (held, held - p), at)
    else:
        return sums


@triton.jit
def segment_of(rows, grads, chunks, scalars, COMPUTE: tl.constexpr):
    """Row, gradient address, first element of the chunk, elements left, engine scalars and scalar row."""
    pid = tl.program_id(0)
    segment = tl.load(chunks + 2 * pid).to(tl.int64)
    start = tl.load(chunks + 2 * pid + 1).to(tl.int64)
    row, srow = rows + segment * ROW_WIDTH, scalars + segment * SCALAR_WIDTH
    e = (
        tl.load(srow + COEFFICIENT).to(COMPUTE),
        tl.load(srow + L2).to(COMPUTE),
        tl.load(srow + DECAY).to(COMPUTE),
        tl.load(srow + L1_PENALTY).to(COMPUTE),
        tl.load(srow + LIMIT).to(COMPUTE),
    )
    return row, tl.load(grads + segment), start, e, srow


@triton.jit
def _update_chunk(
    rows, grads, chunks, scalars, partials,
    RULE: tl.constexpr, VARIANT: tl.constexpr, WEIGHT: tl.constexpr, STATES: tl.constexpr,
    TRANSFORMS: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr,
    SWITCHES: tl.constexpr, ROWWISE: tl.constexpr, BY_EIGHT: tl.constexpr,
    N_SCALARS: tl.constexpr, N_NORMS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Update one chunk. For a two-pass rule (N_NORMS > 0) its norms and n are appended to the rule's scalars."""
    row, gradient, chunk, e, srow = segment_of(rows, grads, chunks, scalars, COMPUTE)
    if tl.load(srow + SKIP) == 0.0:
        s = load_scalars(srow, N_SCALARS, COMPUTE)
        first, count = tl.load(row + MEASURE_START), tl.load(row + MEASURE_COUNT)
        numel = tl.load(row + WHOLE_NUMEL)
        if N_NORMS > 0:
            for i in tl.static_range(N_NORMS):
                s = s + (tl.sqrt(sum_of_squares(partials + i, first, count, N_NORMS, _LANES)).to(COMPUTE),)
            s = s + (numel.to(COMPUTE),)
        scale = e[0]
        if SWITCHES[0]:
            agreeing = sum_of_squares(partials, first, count, 1, _LANES)
            scale = (numel.to(tl.float64) / (agreeing + 1.0)).to(COMPUTE)
        terms = e + (scale, tl.load(srow + EMA_WEIGHT).to(COMPUTE))
        N_SUMS: tl.constexpr = 2 if SWITCHES[4] else 0
        out = change_of(row, chunk)
        start = chunk * CHUNK
        left = place.positions(row, ROWWISE) - start
        r = load_row(row, gradient, len(STATES))
        drawn = all_draws(row, srow, WEIGHT, STATES)
        if (left >= CHUNK) & ((r[0] & ALIGNED) != 0):
            sums = zeros(N_SUMS, BLOCK)
            for o in range(0, CHUNK, BLOCK):
                at = place.straight(start + o, BLOCK, BLOCK)
                sums = update_block(
                    r, terms, s, drawn, at, at, sums,
                    RULE, VARIANT, WEIGHT, STATES, TRANSFORMS, GRAD, COMPUTE, EXACT, SWITCHES, BY_EIGHT, True,
                )  # fmt: skip
            store_sums(out, sums)
        else:
            few_sums = zeros(N_SUMS, TAIL)
            rest = tl.minimum(left, CHUNK).to(tl.int32)
            done = rest * 0
            while done < rest:
                at = place.tail(row, start + done, rest - done, ROWWISE, TAIL)
                few_sums = update_block(
                    r, terms, s, drawn, at, at, few_sums,
                    RULE, VARIANT, WEIGHT, STATES, TRANSFORMS, GRAD, COMPUTE, EXACT, SWITCHES, BY_EIGHT, False,
                )  # fmt: skip
                done += TAIL
            store_sums(out, few_sums)
    else:
        if SWITCHES[4]:
            measure_unchanged(row, chunk, WEIGHT, COMPUTE, CHUNK, TAIL)


@triton.jit
def update_kernel(
    rows, grads, chunks, scalars, partials,
    RULE: tl.constexpr, VARIANT: tl.constexpr, WEIGHT: tl.constexpr, STATES: tl.constexpr,
    TRANSFORMS: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr,
    SWITCHES: tl.constexpr, ROWWISE: tl.constexpr, BY_EIGHT: tl.constexpr,
    N_SCALARS: tl.constexpr, N_NORMS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, SOURCES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Update one chunk; with PROGRAMS, as many as there are on a multiprocessor, every so manieth up to a row of -1."""
    if PROGRAMS == 0:
        _update_chunk(
            rows, grads, chunks, scalars, partials, RULE, VARIANT, WEIGHT, STATES, TRANSFORMS, GRAD, COMPUTE, EXACT,
            SWITCHES, ROWWISE, BY_EIGHT, N_SCALARS, N_NORMS, CHUNK, BLOCK, TAIL,
        )  # fmt: skip
    else:
        while tl.load(chunks + 2 * tl.program_id(0)) >= 0:
            _update_chunk(
                rows, grads, chunks, scalars, partials, RULE, VARIANT, WEIGHT, STATES, TRANSFORMS, GRAD, COMPUTE, EXACT,
                SWITCHES, ROWWISE, BY_EIGHT, N_SCALARS, N_NORMS, CHUNK, BLOCK, TAIL,
            )  # fmt: skip
            chunks += 2 * tl.num_programs(0)


@triton.jit
def _measure_block(
    r, e, s, at, sums,
    MEASURE: tl.constexpr, VARIANT: tl.constexpr, WEIGHT: tl.constexpr, STATES: tl.constexpr,
    TRANSFORMS: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr,
    SWITCHES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    g, p, states = _inputs(r, e, at, at, WEIGHT, STATES, TRANSFORMS, GRAD, COMPUTE, FULL)
    if SWITCHES[0]:
        descent, _ = MEASURE(g, p, states, s, VARIANT, EXACT)
        values = (agrees(descent, g).to(COMPUTE),)
    else:
        values = MEASURE(g, p, states, s, VARIANT, EXACT)
    return add_squares(sums, values, at)


@triton.jit
def measure_kernel(
    rows, grads, chunks, scalars, partials,
    MEASURE: tl.constexpr, VARIANT: tl.constexpr, WEIGHT: tl.constexpr, STATES: tl.constexpr,
    TRANSFORMS: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr,
    SWITCHES: tl.constexpr, ROWWISE: tl.constexpr, BY_EIGHT: tl.constexpr,
    N_SCALARS: tl.constexpr, N_NORMS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """First pass: one partial sum of squares per chunk and norm; nothing else is written.

    For a cautious step MEASURE is the rule's update, and what is summed is where it agrees with the gradient.
    """
    row, gradient, chunk, e, srow = segment_of(rows, grads, chunks, scalars, COMPUTE)
    N_SUMS: tl.constexpr = 1 if SWITCHES[0] else N_NORMS
    s = load_scalars(srow, N_SCALARS, COMPUTE)
    start = chunk * CHUNK
    left = place.positions(row, ROWWISE) - start
    r = load_row(row, gradient, len(STATES))
    out = partials + (tl.load(row + MEASURE_START) + chunk) * N_SUMS
    if (left >= CHUNK) & ((r[0] & ALIGNED) != 0):
        sums = zeros(N_SUMS, BLOCK)
        for o in range(0, CHUNK, BLOCK):
            at = place.straight(start + o, BLOCK, BLOCK)
            sums = _measure_block(
                r, e, s, at, sums,
                MEASURE, VARIANT, WEIGHT, STATES, TRANSFORMS, GRAD, COMPUTE, EXACT, SWITCHES, True,
            )  # fmt: skip
        store_sums(out, sums)
    else:
        few_sums = zeros(N_SUMS, TAIL)
        rest = tl.minimum(left, CHUNK).to(tl.int32)
        done = rest * 0
        while done < rest:
            at = place.tail(row, start + done, rest - done, ROWWISE, TAIL)
            few_sums = _measure_block(
                r, e, s, at, few_sums,
                MEASURE, VARIANT, WEIGHT, STATES, TRANSFORMS, GRAD, COMPUTE, EXACT, SWITCHES, False,
            )  # fmt: skip
            done += TAIL
        store_sums(out, few_sums)
