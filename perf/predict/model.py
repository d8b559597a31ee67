"""A bandwidth model of optimizer steps on GPUs. Its numbers are predictions: see ``predict.py`` for who asks.

Device time: for each sweep over the parameters the larger of bytes / bandwidth and instructions / issue rate; `GAP`
for each launch; what the last blocks of a launch leave idle; with a norm, our one program that joins its parts and
goes through the tensors. Host time: `TENSOR` for each tensor of torch's fused step, for everybody else what rows of
kind host say in proportion; `LAUNCH` for each launch. Wall time: the larger of both. What is left out: the L2 cache,
kernels' latency (2 to 3 µs of a small one), kernels that do not reach the bandwidth of a copy, and waiting for the
device, which torch's scaler does around foreach.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import NamedTuple

import numpy as np
import torch

from fusedopt.formats import SMALLEST
from fusedopt_kernels import table
from fusedopt_kernels.launch import SCALARS_BLOCK
from perf.cases import Fitted
from perf.contenders import FUSEDOPT, Contender, Setup
from perf.contenders.ours import build
from perf.host import Silent
from perf.predict.hardware import Hardware
from perf.predict.launches import WIDE, Arguments, multi_tensor, plan
from perf.report.shown import median
from perf.results import Row
from perf.work import FORMATS, WORKS, Format, Work

TENSOR, LAUNCH = 2e-6, 4e-6
"""Seconds of torch's host. From pytorch#178641, fused AdamW presumably, beside an H200: 10,000 tensors in 20.82 ms with
40 launches and in 21.65 ms with 278; 1,000 in 2.02 ms with 4."""
GAP = 0.9e-6
"""Seconds from kernel to kernel: those of 2.9 µs took 3.8 each (NVIDIA, "Getting Started with CUDA Graphs")."""
JOIN = 0.6e-6
"""Seconds for a tensor of several chunks in the program that joins partial norms. Estimated, from three dependent reads
of L2 at 260 cycles (Luo et al., 2024, on an H100) and a sum over 1,024 lanes."""
TURN = 2e-6
"""Seconds for `SCALARS_BLOCK` tensors in the same program: some ten dependent reads and a chain of fp64 operations."""
IN_FLIGHT = 512 * 16 * 4
"""Bytes that a multiprocessor must have asked for to have its share of the bandwidth: those of one block of torch's
fused kernel. With it the model gives the four times of pytorch#178641 that are not the host's, within 9 %."""
BLOCK = 1024
"""Elements that a program of ours works on at a time."""
FUSED = "torch fused"


class Kernel(NamedTuple):
    """One of ours that walks elements, per parameter. resident: programs that a multiprocessor holds; filling: that it
    takes to have `IN_FLIGHT` bytes asked for.
    """

    bytes: float
    instructions: float
    resident: int
    filling: float

    @classmethod
    def of(cls, row: Row) -> "Kernel":
        """From a row of kind code."""
        registers = 8 * ceil(row["registers"] / 8) * 32 * row["warps"]
        resident = max(1, min(65536 // registers, 64 // row["warps"], 32))
        return cls(row["bytes"], row["instructions"], resident, IN_FLIGHT / (BLOCK * row["loaded"]))


@dataclass(frozen=True)
class Model:
    """kernels: (format, work) → ours. host: (contender, work) → seconds of a step, and more for each tensor."""

    hardware: Hardware
    bandwidth: float
    arguments: Arguments
    kernels: Mapping[tuple[str, str], Sequence[Kernel]]
    host: Mapping[tuple[str, str], tuple[float, float]]

    @classmethod
    def of(
        cls, rows: Sequence[Row], hardware: Hardware, bandwidth: float | None = None, arguments: Arguments = WIDE
    ) -> "Model":
        """From rows of kinds code and host; without them instructions and host times stay unknown."""
        kernels: dict[tuple[str, str], list[Kernel]] = {}
        for row in rows:
            if row["kind"] == "code" and row["arch"] == hardware.arch and row.get("chunk") == "full":
                kernels.setdefault((row["format"], row["work"]), []).append(Kernel.of(row))
        return cls(hardware, bandwidth or hardware.bandwidth, arguments, kernels, host_costs(rows))

    def idle(self, moved: float, blocks: Iterable[int], resident: int, filling: float) -> float:
        """Seconds of bandwidth that the last wave of each launch wastes. moved: bytes of one block.

        Blocks of a wave begin and end together; fewer than fill the bandwidth take as long as those would.
        """
        size, full = resident * self.hardware.multiprocessors, filling * self.hardware.multiprocessors
        short = sum(max(0.0, full - last) for count in blocks if (last := count % size))
        return short * moved / self.bandwidth

    def host_seconds(self, name: str, work: str, tensors: int, launches: int) -> float | None:
        """Python, and launches. Clipping and scaler cost others what they cost torch's fused optimizer."""
        known = self.host.get((name, work))
        alone, fused, around = (self.host.get(key) for key in ((name, "step"), (FUSED, "step"), (FUSED, work)))
        if known is None and alone and fused and around:
            known = alone[0] + around[0] - fused[0], alone[1] + around[1] - fused[1]
        return None if known is None else known[0] + known[1] * tensors + LAUNCH * launches


def host_costs(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[float, float]]:
    """(seconds, seconds per tensor) by contender and work: lines through rows of kind host, all scaled so that torch's
    fused step takes `TENSOR`.
    """
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row["kind"] == "host" and (us := median(row["host_us"])) is not None:
            points.setdefault((row["contender"], row["work"]), []).append((row["tensors"], us))
    lines = {key: _line(np.array(found, float)) for key, found in points.items()}
    if (FUSED, "step") not in lines:
        return {}
    scale = TENSOR / lines[FUSED, "step"][1]
    return {key: (scale * begin, scale * slope) for key, (begin, slope) in lines.items()}


def _line(points: np.ndarray) -> tuple[float, float]:
    """(value at 0, slope), by least squares of relative errors."""
    x, y = points.T
    if len(set(x)) < 2:
        return 0.0, float(y.mean() / x.mean())
    slope, begin = np.polyfit(x, y, 1, w=1 / y)
    if begin < 0:  # caches that overflow bend the line: through 0 then
        return 0.0, float((x / y).sum() / ((x / y) ** 2).sum())
    return float(begin), float(slope)


@dataclass(frozen=True)
class Prediction:
    """Seconds. sweeps, gaps, idle, joins: parts of the device's. launches, host: None where nothing is known of them,
    and then the device may take longer.
    """

    sweeps: float
    idle: float
    joins: float
    launches: int | None
    host: float | None
    instructions: float | None = None

    @property
    def gaps(self) -> float:
        """Of all launches."""
        return GAP * (self.launches or 0)

    @property
    def device(self) -> float:
        """From the first kernel to the last."""
        return self.sweeps + self.gaps + self.idle + self.joins

    @property
    def wall(self) -> float | None:
        """Until all is done."""
        return None if self.host is None else max(self.device, self.host)


def predict(model: Model, contender: Contender, fitted: Fitted, form: Format, work: Work) -> Prediction | None:
    """Of a plain step, outside CUDA graphs. None for a contender whose traffic nobody knows."""
    moved = contender.traffic(form.name, work.name)
    if moved is None:
        return None
    if contender.name == FUSEDOPT.name:
        return _ours(model, fitted, form, work, moved[0])
    sizes = tuple(map(prod, fitted.shapes.values()))
    known = plan(contender, form.name, work.name)
    if known is None:
        return Prediction(moved[0] * fitted.elements / model.bandwidth, 0.0, 0.0, None, None)
    idle = 0.0
    for sweep in known.sweeps:
        if sweep.lists:
            calls = multi_tensor(sizes, sweep.lists, known.own or model.arguments)
            idle += model.idle(sweep.bytes * fitted.elements / sum(calls), calls, sweep.resident, 1.0)
    launches = known.count(sizes, model.arguments)
    sweeps = sum(sweep.bytes for sweep in known.sweeps) * fitted.elements / model.bandwidth
    host = model.host_seconds(contender.name, work.name, len(sizes), launches)
    return Prediction(sweeps, idle, 0.0, launches, host)


def _ours(model: Model, fitted: Fitted, form: Format, work: Work, moved: float) -> Prediction:
    kernels = model.kernels.get((form.name, work.name), ())
    sizes = tuple(map(prod, fitted.shapes.values()))
    chunks = sum(-(-size // table.CHUNK) for size in sizes)
    n, idle, sweeps = fitted.elements, 0.0, 0.0 if kernels else moved * fitted.elements / model.bandwidth
    for kernel in kernels:
        sweeps += max(kernel.bytes * n / model.bandwidth, kernel.instructions * n / model.hardware.issue_rate)
        idle += model.idle(kernel.bytes * n / chunks, [chunks], kernel.resident, kernel.filling)
    joins = 0.0
    if work.clip:  # without a norm, many programs share this
        joins = JOIN * sum(size > table.NORM_CHUNK for size in sizes) + TURN * ceil(len(sizes) / SCALARS_BLOCK)
    launches = own_launches(tuple(fitted.shapes.values()), form.name, work.name)
    host = model.host_seconds(FUSEDOPT.name, work.name, len(sizes), launches + 1)  # the upload is one more
    instructions = sum(kernel.instructions for kernel in kernels) if kernels else None
    return Prediction(sweeps, idle, joins, launches, host, instructions)


def own_launches(shapes: Sequence[tuple[int, ...]], form: str, work: str) -> int:
    """Launches of a step of ours over parameters of these shapes, and of the scaler's update."""
    return _launches(frozenset(map(_small, shapes)), form, work)


def _small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that takes the same kernels: quantised or not, of whole groups or not."""
    if len(shape) < 2 or prod(shape) < SMALLEST:
        return (1,)
    group = 1 if prod(shape[1:]) % table.SCALE_GROUP else table.SCALE_GROUP
    return SMALLEST // group, group


@cache
def _launches(shapes: frozenset[tuple[int, ...]], form: str, work: str) -> int:
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=FORMATS[form].dtype)) for shape in sorted(shapes)]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = build(Setup(params, FORMATS[form], WORKS[work]), backend="triton")
    optimizer._launcher = silent = Silent()
    optimizer.step()
    return silent.launches + WORKS[work].scaled
