"""Launch shapes of the kernels that walk elements: one row for each kind of format. This is where to change them.

``perf/notes/tuning.md`` says how they were chosen. ``python -m perf.tune`` tries others: on a GPU it measures them and
names the rows to change, elsewhere it reads what the compiler makes of them. How long chunks are is in no row, since
the host cuts them before it knows a variant: that is `table.CHUNK`, which host and kernels both read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from . import numerics, table

DISASSEMBLY = "disassembly"
"""Not measured: chosen from what the compiler makes of it."""


@dataclass(frozen=True)
class Shape:
    """block, tail: elements at a time, of aligned full chunks and of all else. warps: of a program.

    programs: how many a multiprocessor has, to walk all chunks between them; 0: as many as there are chunks. chosen:
    from what: `DISASSEMBLY`, or ``"measured on"`` a GPU.
    """

    block: int
    tail: int
    warps: int
    programs: int = 0
    chosen: str = DISASSEMBLY


SHAPES = {
    "fp32": Shape(1024, 512, 4),
    "half": Shape(1024, 512, 4),
    "fp64": Shape(1024, 512, 8),
    "mixed": Shape(1024, 512, 8),
    "quantised": Shape(1024, 256, 4),
}
"""Tails have another size than blocks: with equal ones the compiler shares layouts between both, by way of barriers. A
thread has 8 elements, or 4: in fp64, which takes twice the registers, and of mixed widths, whose vectors of different
lengths would else meet in shared memory. Groups of quantised state are made of octets."""


def kind(types: Iterable[Any]) -> str:
    """The row for elements of these Triton types: "half" is 2 bytes throughout, "quantised" has 1-byte codes."""
    widths = frozenset(t.primitive_bitwidth // 8 for t in types)
    if min(widths) <= 1:
        return "quantised"
    return {frozenset({2}): "half", frozenset({4}): "fp32", frozenset({8}): "fp64"}.get(widths, "mixed")


def shape(types: Iterable[Any]) -> Shape:
    """The launch shape for elements of these types. Interpreted, a block is a chunk: each costs Python time."""
    chosen = SHAPES[kind(types)]
    return replace(chosen, block=table.CHUNK, tail=table.CHUNK) if numerics.INTERPRETED else chosen


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; where there is none, as many as a large one has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128
