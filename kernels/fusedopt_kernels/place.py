"""Which elements, groups of elements and random numbers a block of a segment has.

``at`` of a block, as codecs take it: ``(start, lanes, mask)`` of its elements (``memory.py``), then of its groups
``(first group, group of every octet from there, mask of octets)``. A group is a run of GROUP elements inside one row
along dim 0; the last one of a row may be shorter. An octet is eight neighbours: what one thread holds, so that nothing
is exchanged between threads but a group's maximum.

Segments whose rows are multiples of GROUP are walked straight through memory. Others are walked ROWWISE, as if every
row were filled up to whole groups: positions that are no elements are masked.
"""

import triton
import triton.language as tl

from .rng import dither, random16, random16_by_eight
from .table import COUNT, DITHERED, GLOBAL_OFFSET, GLOBAL_STRIDE, NUMEL, ROW_LENGTH, SCALE_GROUP

_GROUP = tl.constexpr(SCALE_GROUP)


@triton.jit
def _groups(position, left, N: tl.constexpr):
    """Groups of N positions from one that begins a group; left: positions from there to the end."""
    octets = tl.arange(0, N // 8)
    return (position // _GROUP, octets // (_GROUP // 8), octets * 8 < left)


@triton.jit
def spread(x):
    """(N/8,) to (N,): every octet's number for each of its elements."""
    n: tl.constexpr = x.shape[0]
    return tl.reshape(tl.broadcast_to(x[:, None], (n, 8)), (n * 8,))


@triton.jit
def straight(start, left, N: tl.constexpr):
    """``at`` of N elements from ``start`` on, of which ``left`` exist."""
    lanes = tl.arange(0, N)
    return (start, lanes, lanes < left) + _groups(start, left, N)


@triton.jit
def filled(length):
    """Length of a row filled up to whole groups."""
    return (length + _GROUP - 1) // _GROUP * _GROUP


@triton.jit
def _rows(start, lanes, length):
    """Row of ``start`` among rows of ``length``, column there, and how many rows further each lane is: int64, int64,
    int32. One division of 64 bits in all, each of which takes a hundred instructions.

    Of rows longer than 2³⁰ only the last 2³⁰ columns count: those before are in no further row.
    """
    down = start // length
    across = start - down * length
    beyond = tl.maximum(length - 1073741824, 0)
    near = tl.maximum(across - beyond, -1048576).to(tl.int32)  # a block is shorter
    further = tl.maximum(near + lanes, 0).to(tl.uint32) // (length - beyond).to(tl.uint32)
    return down, across, further.to(tl.int32)


@triton.jit
def rowwise(row, start, left, N: tl.constexpr):
    """``at`` of N positions from ``start`` on, counted in filled rows."""
    length = tl.load(row + ROW_LENGTH)
    wide, octets, lanes = filled(length), tl.arange(0, N // 8) * 8, tl.arange(0, N)
    down, across, further = _rows(start, octets, wide)  # an octet lies in one row
    first = octets - further * (wide - length).to(tl.int32)
    exist = tl.minimum(length - across - octets + further * wide, 8).to(tl.int32)
    eighth = lanes % 8
    mask = (lanes < left) & (eighth < spread(exist))
    return (down * length + across, spread(first) + eighth, mask) + _groups(start, left, N)


@triton.jit
def touched(row, index, start, left, N: tl.constexpr):
    """The same for the rows that a sparse gradient touches, one after the other; index: pointer to their numbers.

    Returns ``at`` of the parameter's elements and of the gradient's.
    """
    length = tl.load(row + ROW_LENGTH)
    wide, lanes, octets = filled(length), tl.arange(0, N), tl.arange(0, N // 8) * 8
    position = start + lanes
    down = position // wide
    across = position - down * wide
    mask = (lanes < left) & (across < length)
    here = tl.load(index + down, mask=mask, other=0)
    eight = octets < left
    first = start + octets
    group = tl.load(index + first // wide, mask=eight, other=0) * (wide // _GROUP) + first % wide // _GROUP
    zero = start * 0
    return (zero, here * length + across, mask, zero, group, eight), (zero, down * length + across, mask)


@triton.jit
def positions(row, ROWWISE: tl.constexpr):
    """What a segment's chunks share out: its elements, or positions in filled rows."""
    numel = tl.load(row + NUMEL)
    if ROWWISE:
        length = tl.load(row + ROW_LENGTH)
        return numel // tl.maximum(length, 1) * filled(length)
    else:
        return numel


@triton.jit
def tail(row, start, left, ROWWISE: tl.constexpr, N: tl.constexpr):
    """``at`` of a block that may be cut short."""
    if ROWWISE:
        return rowwise(row, start, left, N)
    else:
        return straight(start, left, N)


@triton.jit
def draws(row, srow, KEY: tl.constexpr, RANDOM: tl.constexpr):
    """What random bits depend on, read once: (key, step, row length, stride, offset); nothing if NEAREST."""
    if RANDOM:
        length = tl.maximum(tl.load(row + ROW_LENGTH), 1)
        where = (length, tl.load(row + GLOBAL_STRIDE), tl.load(row + GLOBAL_OFFSET))
        return (tl.load(row + KEY), tl.load(srow + COUNT).to(tl.int64)) + where
    else:
        return ()


@triton.jit
def noise(drawn, at, RANDOM: tl.constexpr, BY_EIGHT: tl.constexpr):
    """Bits that round every element of a block, uint32: 16 random ones, or 32 of `dither`; 0 if it is to nearest.

    BY_EIGHT: its elements are neighbours, the first index a multiple of 8.
    """
    if not RANDOM:
        return 0
    elif BY_EIGHT:
        if RANDOM == DITHERED:
            return dither(drawn[4] + at[0], drawn[1]) + dither(at[1].to(tl.int64), 0)
        else:
            return random16_by_eight(drawn[0], drawn[4] + at[0], drawn[1], at[1].shape[0])
    else:
        if at[1].dtype == tl.int32:
            down, _, further = _rows(at[0], at[1], drawn[2])
            index = drawn[4] + down * (drawn[3] - drawn[2]) + at[0] + (at[1] + further * (drawn[3] - drawn[2]))
        else:
            local = at[0] + at[1]
            down = local // drawn[2]
            index = drawn[4] + down * drawn[3] + (local - down * drawn[2])
        return dither(index, drawn[1]) if RANDOM == DITHERED else random16(drawn[0], index, drawn[1])
