"""Launch shapes that are tried: for each row of `tuning.SHAPES` the present one, and others that differ in one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import fusedopt
from fusedopt_kernels import table, tuning
from perf.contenders.ours import OPTIONS
from perf.results import Row
from perf.work import ADAMW, FORMATS, MAX_NORM, Format

PRESENT = "present"
"""What the table says now."""


@dataclass(frozen=True)
class Trial:
    """An AdamW with clipping whose update takes one row of the table. cases: what it is timed on, the largest first."""

    form: Format
    options: Mapping[str, Any]
    cases: Sequence[str]

    def build(self, params: Sequence[torch.nn.Parameter]) -> Any:
        """The optimizer."""
        return fusedopt.AdamW(params, **ADAMW, clip_grad_norm=MAX_NORM, **self.options, backend="triton")


LARGE, SMALL = ("llama3.2-1b", "gpt2", "resnet50"), ("tiny-1000",)
TRIALS = {
    "fp32": Trial(FORMATS["fp32"], OPTIONS["fp32"], LARGE + SMALL),
    "quantised": Trial(FORMATS["int8"], OPTIONS["int8"], LARGE),  # tiny tensors keep fp32 state
    "mixed": Trial(FORMATS["bf16"], OPTIONS["bf16"], LARGE + SMALL),
    "half": Trial(
        Format("bf16 state", "bf16 weights that lose nothing, bf16 moments", torch.bfloat16, 14, 0.0),
        {"master_weights": "split16", "state_dtype": "bfloat16"},
        LARGE[1:],
    ),
    "fp64": Trial(Format("fp64", "fp64 throughout", torch.float64, 40, 0.0), {}, LARGE[1:2]),
}
"""By row of the table, the most wanted first."""


@dataclass(frozen=True)
class Candidate:
    """A row of the table; chunk: elements of one; arena: state lies in one buffer."""

    shape: tuning.Shape
    chunk: int
    arena: bool = False

    def fields(self) -> Row:
        """Fields of a row of results."""
        shape = self.shape
        sizes: Row = {"block": shape.block, "tail": shape.tail, "warps": shape.warps, "programs": shape.programs}
        return {**sizes, "chunk": self.chunk, "arena": self.arena}


SHAPES = (
    (512, 256, 2), (512, 256, 4), (1024, 128, 4), (1024, 256, 4), (1024, 512, 4), (1024, 1024, 4), (1024, 512, 8),
    (2048, 1024, 4), (2048, 1024, 8),
)  # fmt: skip
"""Block, tail, warps."""
RESIDENT_WARPS = (16, 32)
"""Of a multiprocessor, for persistent grids."""
CHUNKS = (4096, 8192, 32768)


def candidates(kind: str, only: str = "") -> dict[str, Candidate]:
    """By name, what the table says first; only: those whose names hold this."""
    now = Candidate(tuning.SHAPES[kind], table.CHUNK)
    shape = now.shape
    found = {PRESENT: now}
    for block, tail, warps in SHAPES:
        if (block, tail, warps) != (shape.block, shape.tail, shape.warps):
            other = replace(shape, block=block, tail=tail, warps=warps)
            found[f"{block} / {tail}, {warps} warps"] = replace(now, shape=other)
    for resident in RESIDENT_WARPS:
        if (programs := resident // shape.warps) != shape.programs:
            found[f"persistent, {programs} programs"] = replace(now, shape=replace(shape, programs=programs))
    if shape.programs:
        found["a program for every chunk"] = replace(now, shape=replace(shape, programs=0))
    found |= {f"chunks of {chunk:,}": replace(now, chunk=chunk) for chunk in CHUNKS if chunk != now.chunk}
    found["state in one buffer"] = replace(now, arena=True)
    return {name: c for name, c in found.items() if name == PRESENT or only in name}


@contextmanager
def applied(kind: str, candidate: Candidate) -> Iterator[None]:
    """What is planned inside takes this row and these chunks; chunks are cut by the host, so plans keep them."""
    shape, chunk = tuning.SHAPES[kind], table.CHUNK
    tuning.SHAPES[kind], table.CHUNK = candidate.shape, candidate.chunk
    try:
        yield
    finally:
        tuning.SHAPES[kind], table.CHUNK = shape, chunk
