"""Tiles of stacks of matrices: which elements, rows and columns a program works on.

A parameter of shape (…, rows, columns) is a stack of matrices. A tile covers TILE = (matrices, rows, columns), powers
of two; small matrices lie whole in it, several at once. ``where`` is its place, counted in tiles, ``size`` the
parameter's (matrices, rows, columns). ``at`` as in ``memory.py``.
"""

import triton
import triton.language as tl

from .table import ALIGNED, FLAGS

# Columns of a segment row: two slots, then instead of the others
MATRICES = tl.constexpr(24)  # matrices in the stack
HEIGHT = tl.constexpr(25)  # rows of one
WIDTH = tl.constexpr(26)  # columns of one
DOWN = tl.constexpr(27)  # tiles from top to bottom of one
ACROSS = tl.constexpr(28)  # tiles from left to right
ROW_SUMS = tl.constexpr(29)  # offset in partials: ACROSS sums of every row, each (matrices, rows)
COLUMN_SUMS = tl.constexpr(30)  # offset in partials: DOWN sums of every column, each (matrices, columns)
MEANS = tl.constexpr(31)  # offset in partials: mean of each matrix, where it is taller than a tile


@triton.jit
def place(row, tile):
    """(first matrix, row, column of a tile in tiles; matrices, rows, columns of the parameter)."""
    down, across = tl.load(row + DOWN), tl.load(row + ACROSS)
    where = (tile // (across * down), tile // across % down, tile % across)
    return where, (tl.load(row + MATRICES), tl.load(row + HEIGHT), tl.load(row + WIDTH))


@triton.jit
def is_full(row, where, size, TILE: tl.constexpr):
    """Whether a tile is all inside and its rows begin at multiples of 16 bytes (then ALIGNED says so)."""
    inside = ((where[0] + 1) * TILE[0] <= size[0]) & ((where[1] + 1) * TILE[1] <= size[1])
    return inside & ((where[2] + 1) * TILE[2] <= size[2]) & ((tl.load(row + FLAGS) & ALIGNED) != 0)


@triton.jit
def lines_of(where, size, TILE: tl.constexpr):
    """Rows of a tile, all matrices below each other: ``at`` of their entries in (matrices, rows)."""
    lines = tl.arange(0, TILE[0] * TILE[1])
    b, i = lines // TILE[1], lines % TILE[1]
    mask = (where[0] * TILE[0] + b < size[0]) & (where[1] * TILE[1] + i < size[1])
    return where[0] * TILE[0] * size[1] + where[1] * TILE[1], b * size[1].to(tl.int32) + i, mask


@triton.jit
def columns_of(where, size, TILE: tl.constexpr):
    """Columns of each matrix of a tile, (TILE[0], TILE[2]): ``at`` of their entries in (matrices, columns)."""
    b, j = tl.arange(0, TILE[0])[:, None], tl.arange(0, TILE[2])[None, :]
    mask = (where[0] * TILE[0] + b < size[0]) & (where[2] * TILE[2] + j < size[2])
    return where[0] * TILE[0] * size[2] + where[2] * TILE[2], b * size[2].to(tl.int32) + j, mask


@triton.jit
def elements_of(where, size, TILE: tl.constexpr, FULL: tl.constexpr):
    """``at`` of a tile's elements, (TILE[0]·TILE[1], TILE[2]), in the parameter."""
    line = lines_of(where, size, TILE)
    first, width = line[0] * size[2], size[2].to(tl.int32)
    if FULL:
        first, width = tl.multiple_of(first, 8), tl.multiple_of(width, 8)
    j = tl.arange(0, TILE[2])
    mask = line[2][:, None] & (where[2] * TILE[2] + j < size[2])[None, :]
    return first + where[2] * TILE[2], line[1][:, None] * width + j[None, :], mask
