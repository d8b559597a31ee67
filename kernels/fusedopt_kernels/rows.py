"""The update of a sparse gradient: only the rows it touches are gathered, updated and scattered, in one pass.

A segment's gradient holds the values of its touched rows one after the other, its row the addresses of their indices.
Everything around the rule is that of ``step.py``; masked accesses, coalesced within a row.
"""

import triton
import triton.language as tl

from . import place
from .step import all_draws, load_row, load_scalars, segment_of, update_block
from .table import INDEX, SKIP


@triton.jit
def rows_kernel(
    rows, grads, chunks, scalars, partials,
    RULE: tl.constexpr, VARIANT: tl.constexpr, WEIGHT: tl.constexpr, STATES: tl.constexpr,
    TRANSFORMS: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr,
    SWITCHES: tl.constexpr, ROWWISE: tl.constexpr, BY_EIGHT: tl.constexpr,
    N_SCALARS: tl.constexpr, N_NORMS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Update one chunk of touched elements; NUMEL counts them."""
    row, gradient, chunk, e, srow = segment_of(rows, grads, chunks, scalars, COMPUTE)
    if tl.load(srow + SKIP) == 0.0:
        s = load_scalars(srow, N_SCALARS, COMPUTE)
        r = load_row(row, gradient, len(STATES))
        index = tl.load(row + INDEX).to(tl.pointer_type(tl.int64), bitcast=True)
        start = chunk * CHUNK
        rest = tl.minimum(place.positions(row, True) - start, CHUNK).to(tl.int32)
        done = rest * 0
        while done < rest:
            at, at_g = place.touched(row, index, start + done, rest - done, BLOCK)
            update_block(
                r, e, s, all_draws(row, srow, WEIGHT, STATES), at, at_g, (),
                RULE, VARIANT, WEIGHT, STATES, TRANSFORMS, GRAD, COMPUTE, EXACT, SWITCHES, BY_EIGHT, False,
            )  # fmt: skip
            done += BLOCK
