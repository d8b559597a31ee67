"""Factored second moments (Adafactor): six launches over all matrices at once, deterministic, without atomics.

Programs walk tiles of stacks of matrices (``tiles.py``). All sums are fp64.

1. `sums_kernel`: sums of g² over each tile's rows and columns.
2. `moments_kernel`: combines them and renews the row and column averages.
3. `means_kernel`: mean of the row averages of each matrix that is taller than a tile.
4. `measure_kernel`: per tile, sums of p² and u², where u = RULE(g, v), v = row·column/mean the variance.
5. `numbers_kernel`: the step size of each parameter.
6. `apply_kernel`: p ← p − (step·u + decay·p), rounded once.

The gradient is read three times, the parameter twice; in large matrices sums and averages take another half byte an
element. ``partials`` holds, at offsets that stand in the segment's row, sums of rows and of columns, means, and pairs
of sums by tile.
"""

import triton
import triton.language as tl

from . import memory
from .numerics import average, maximum
from .place import draws
from .place import noise as random_bits
from .step import agrees, load_scalars, segment_of
from .sums import sum_of_squares
from .table import (
    FLAGS,
    LANES,
    MASK,
    MEASURE_COUNT,
    MEASURE_START,
    NUMEL,
    PARAM,
    RESIDUAL,
    RULE_SCALARS,
    SCALAR_WIDTH,
    SKIP,
    SLOTS,
    WEIGHT_KEY,
)  # fmt: skip
from .tiles import (
    ACROSS,
    COLUMN_SUMS,
    DOWN,
    HEIGHT,
    MATRICES,
    MEANS,
    ROW_SUMS,
    WIDTH,
    columns_of,
    elements_of,
    is_full,
    lines_of,
    place,
)  # fmt: skip

_LANES = tl.constexpr(LANES)

# Numbers of a segment: the rule's `scalars`, of which these are used here, and what `numbers_kernel` writes.
AVERAGE = tl.constexpr(RULE_SCALARS.value)  # weight of the averages
SMALLEST = tl.constexpr(RULE_SCALARS.value + 1)  # smallest mean
STEP_SIZE = tl.constexpr(SCALAR_WIDTH.value - 1)


@triton.jit
def _gradient(
    row, gradient, e, at, TRANSFORMS: tl.constexpr, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Transformed gradient of a tile; transforms that need the parameter are not supported."""
    g = memory.load(gradient, at, T, COMPUTE, FULL)
    for i in tl.static_range(len(TRANSFORMS)):
        g = TRANSFORMS[i](g, g, tl.load(row + FLAGS), e)
    return g


@triton.jit
def _sums(
    row, gradient, e, partials, where, size,
    TILE: tl.constexpr, TRANSFORMS: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    at = elements_of(where, size, TILE, FULL)
    g = _gradient(row, gradient, e, at, TRANSFORMS, GRAD, COMPUTE, FULL).to(tl.float64)
    if not FULL:
        g = tl.where(at[2], g, 0.0)
    square = g * g
    start, lanes, mask = lines_of(where, size, TILE)
    out = partials + tl.load(row + ROW_SUMS) + where[2] * size[0] * size[1] + start
    tl.store(out + lanes, tl.sum(square, axis=1), mask=mask)
    start, lanes, mask = columns_of(where, size, TILE)
    out = partials + tl.load(row + COLUMN_SUMS) + where[1] * size[0] * size[2] + start
    tl.store(out + lanes, tl.sum(tl.reshape(square, TILE), axis=1), mask=mask)


@triton.jit
def sums_kernel(
    rows, grads, chunks, scalars, partials,
    TILE: tl.constexpr, TRANSFORMS: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    row, gradient, tile, e, _ = segment_of(rows, grads, chunks, scalars, COMPUTE)
    where, size = place(row, tile)
    if is_full(row, where, size, TILE):
        _sums(row, gradient, e, partials, where, size, TILE, TRANSFORMS, GRAD, COMPUTE, True)
    else:
        _sums(row, gradient, e, partials, where, size, TILE, TRANSFORMS, GRAD, COMPUTE, False)


@triton.jit
def _renew(partials, parts, n, over, address, start, w, STATE: tl.constexpr, BLOCK: tl.constexpr):
    """Average of ``over`` squares for BLOCK of n rows or columns, of which ``parts`` sums lie n apart."""
    lanes = tl.arange(0, BLOCK)
    mask = start + lanes < n
    total = tl.zeros((BLOCK,), tl.float64)
    k = parts * 0
    while k < parts:
        total += tl.load(partials + k * n + start + lanes, mask=mask, other=0.0)
        k += 1
    at = (start, lanes, mask)
    old = STATE[0](address, address, at, STATE[2], tl.float64, False)
    new = average(old, total / over, w)
    if STATE[2] != tl.float64:
        new = new.to(tl.float32)  # as torch's casts do on the way to 16 bits
    STATE[1](address, address, at, new, 0, STATE[2], False, False)


@triton.jit
def moments_kernel(
    rows, grads, chunks, scalars, partials, STATES: tl.constexpr, BLOCK: tl.constexpr, SOURCES: tl.constexpr
):  # fmt: skip
    """Renew one block of row averages or, after all of those, of column averages."""
    row, _, block, _, srow = segment_of(rows, grads, chunks, scalars, tl.float64)
    matrices, height, width = tl.load(row + MATRICES), tl.load(row + HEIGHT), tl.load(row + WIDTH)
    before, w = (matrices * height + BLOCK - 1) // BLOCK, tl.load(srow + AVERAGE)
    if tl.load(srow + SKIP) == 0.0:
        if block < before:
            sums, parts = partials + tl.load(row + ROW_SUMS), tl.load(row + ACROSS)
            address, over = tl.load(row + SLOTS), width.to(tl.float64)
            _renew(sums, parts, matrices * height, over, address, block * BLOCK, w, STATES[0], BLOCK)
        else:
            sums, parts = partials + tl.load(row + COLUMN_SUMS), tl.load(row + DOWN)
            address, over = tl.load(row + SLOTS + 2), height.to(tl.float64)
            _renew(sums, parts, matrices * width, over, address, (block - before) * BLOCK, w, STATES[1], BLOCK)


@triton.jit
def means_kernel(
    rows, grads, chunks, scalars, partials, STATES: tl.constexpr, BLOCK: tl.constexpr, SOURCES: tl.constexpr
):  # fmt: skip
    """Mean of the row averages of one matrix."""
    row, _, matrix, _, _ = segment_of(rows, grads, chunks, scalars, tl.float64)
    height, address = tl.load(row + HEIGHT), tl.load(row + SLOTS)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    done = height * 0
    while done < height:
        at = (matrix * height + done, lanes, done + lanes < height)
        total += STATES[0][0](address, address, at, STATES[0][2], tl.float64, False)
        done += BLOCK
    tl.store(partials + tl.load(row + MEANS) + matrix, tl.sum(total) / height.to(tl.float64))


@triton.jit
def _variance(row, srow, partials, where, size, STATES: tl.constexpr, TILE: tl.constexpr, COMPUTE: tl.constexpr):
    """Estimate row/mean·column of a tile's variances. A tile holds whole matrices unless it lies in a taller one."""
    at = lines_of(where, size, TILE)
    lines = STATES[0][0](tl.load(row + SLOTS), tl.load(row + SLOTS), at, STATES[0][2], tl.float64, False)
    lines = tl.reshape(lines, (TILE[0], TILE[1]))
    if tl.load(row + DOWN) == 1:
        mean = tl.sum(lines, axis=1) / size[1].to(tl.float64)
    else:  # then it holds one
        mean = tl.load(partials + tl.load(row + MEANS) + where[0] + tl.arange(0, TILE[0]) * 0)
    lines = lines / maximum(mean, tl.load(srow + SMALLEST))[:, None]
    at = columns_of(where, size, TILE)
    columns = STATES[1][0](tl.load(row + SLOTS + 2), tl.load(row + SLOTS + 2), at, STATES[1][2], COMPUTE, False)
    return tl.reshape(lines.to(COMPUTE)[:, :, None] * columns[:, None, :], (TILE[0] * TILE[1], TILE[2]))


@triton.jit
def measure_kernel(
    rows, grads, chunks, scalars, partials,
    TILE: tl.constexpr, RULE: tl.constexpr, N_SCALARS: tl.constexpr, WEIGHT: tl.constexpr, STATES: tl.constexpr,
    TRANSFORMS: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Sums of p² and u² over one tile."""
    row, gradient, tile, e, srow = segment_of(rows, grads, chunks, scalars, COMPUTE)
    where, size = place(row, tile)
    variance = _variance(row, srow, partials, where, size, STATES, TILE, COMPUTE)
    param, residual = tl.load(row + PARAM), tl.load(row + RESIDUAL)
    if is_full(row, where, size, TILE):
        at = elements_of(where, size, TILE, True)
        g = _gradient(row, gradient, e, at, TRANSFORMS, GRAD, COMPUTE, True)
        p = WEIGHT[0](param, residual, at, WEIGHT[2], COMPUTE, True)
    else:
        at = elements_of(where, size, TILE, False)
        g = _gradient(row, gradient, e, at, TRANSFORMS, GRAD, COMPUTE, False)
        p = WEIGHT[0](param, residual, at, WEIGHT[2], COMPUTE, False)
    u = RULE(g, variance, load_scalars(srow, N_SCALARS, COMPUTE), EXACT)
    mask = elements_of(where, size, TILE, False)[2]
    u, p = tl.where(mask, u, 0.0).to(tl.float64), tl.where(mask, p, 0.0).to(tl.float64)
    out = partials + tl.load(row + MEASURE_START) + 2 * tile
    tl.store(out, tl.sum(tl.sum(p * p, axis=1)))
    tl.store(out + 1, tl.sum(tl.sum(u * u, axis=1)))


@triton.jit
def numbers_kernel(
    rows, grads, chunks, scalars, partials,
    RULE: tl.constexpr, N_SCALARS: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Step size of one parameter: RULE of its scalars, both norms and the number of elements."""
    row, _, _, _, srow = segment_of(rows, grads, chunks, scalars, COMPUTE)
    first, count = tl.load(row + MEASURE_START), tl.load(row + MEASURE_COUNT)
    s = load_scalars(srow, N_SCALARS, COMPUTE)
    for i in tl.static_range(2):
        s = s + (tl.sqrt(sum_of_squares(partials + first + i, count * 0, count, 2, _LANES)).to(COMPUTE),)
    tl.store(srow + STEP_SIZE, RULE(s + (tl.load(row + NUMEL).to(COMPUTE),), EXACT))


@triton.jit
def _apply(
    row, gradient, e, srow, variance, at,
    RULE: tl.constexpr, N_SCALARS: tl.constexpr, WEIGHT: tl.constexpr, TRANSFORMS: tl.constexpr, GRAD: tl.constexpr,
    COMPUTE: tl.constexpr, EXACT: tl.constexpr, SWITCHES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    param, residual = tl.load(row + PARAM), tl.load(row + RESIDUAL)
    g = _gradient(row, gradient, e, at, TRANSFORMS, GRAD, COMPUTE, FULL)
    p = WEIGHT[0](param, residual, at, WEIGHT[2], COMPUTE, FULL)
    u = RULE(g, variance, load_scalars(srow, N_SCALARS, COMPUTE), EXACT)
    descent = tl.load(srow + STEP_SIZE).to(COMPUTE) * u
    total = tl.where(e[2] != 0.0, descent + e[2] * p, descent)
    if SWITCHES[1]:
        total = tl.where(agrees(descent, 0.0 - p), descent, total)
    x = p - total
    if SWITCHES[2]:
        x = tl.where(memory.load(tl.load(row + MASK), at, tl.int8, tl.int32, FULL) != 0, x, p)
    noise = random_bits(draws(row, srow, WEIGHT_KEY, WEIGHT[3]), at, WEIGHT[3], False)
    WEIGHT[1](param, residual, at, x, noise, WEIGHT[2], WEIGHT[3], FULL)


@triton.jit
def apply_kernel(
    rows, grads, chunks, scalars, partials,
    TILE: tl.constexpr, RULE: tl.constexpr, N_SCALARS: tl.constexpr, WEIGHT: tl.constexpr, STATES: tl.constexpr,
    TRANSFORMS: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr,
    SWITCHES: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Update one tile. SWITCHES as in ``step.py``."""
    row, gradient, tile, e, srow = segment_of(rows, grads, chunks, scalars, COMPUTE)
    if tl.load(srow + SKIP) == 0.0:
        where, size = place(row, tile)
        variance = _variance(row, srow, partials, where, size, STATES, TILE, COMPUTE)
        if is_full(row, where, size, TILE):
            at = elements_of(where, size, TILE, True)
            _apply(
                row, gradient, e, srow, variance, at,
                RULE, N_SCALARS, WEIGHT, TRANSFORMS, GRAD, COMPUTE, EXACT, SWITCHES, True,
            )  # fmt: skip
        else:
            at = elements_of(where, size, TILE, False)
            _apply(
                row, gradient, e, srow, variance, at,
                RULE, N_SCALARS, WEIGHT, TRANSFORMS, GRAD, COMPUTE, EXACT, SWITCHES, False,
            )  # fmt: skip
