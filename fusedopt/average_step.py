"""The weight average in a pass of its own, after all updates of a step.

With kernels for what no update kernel averages: parameters without a gradient, with a sparse one, or under a rule
with kernels of its own; one scalars launch and one launch for each weight format and dtype. Without kernels for all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedopt_kernels import average, launch, table, tuning
from fusedopt_kernels.numerics import compute_type, triton_type
from fusedopt_kernels.param.format import WeightFormat

from .blocks import Lane, Task, Workers, tasks_of
from .groups import GroupOptions
from .numbers import Shared
from .ports import Port, weight_port
from .segment import Segment
from .tables import DeviceTables, Launch, weight_codec
from .values import Program, Tape, Values, scalar_type


class AverageTables(DeviceTables):
    """Tables and launches for segments of one device, whatever their rules."""

    measures = False

    def __init__(self, segments: Sequence[Segment], groups: Sequence[GroupOptions], shared: Shared) -> None:
        super().__init__(groups[segments[0].group].rule, segments, groups, shared)
        touched = [[t for t in (s.weight, s.residual, s.ema) if t is not None] for s in segments]
        aligned = [all(t.data_ptr() % 16 == 0 for t in tensors) for tensors in touched]
        self.rows.array[:, table.FLAGS.value] = [table.ALIGNED.value * yes for yes in aligned]
        self.rows.upload()
        self._skipped = self.header[table.SKIPPED.value :][:1]
        self._averages = self._average_launches()

    def _grad_dtypes(self) -> set[torch.dtype]:
        return set()

    def set_gradients(self, addresses: list[int]) -> None:
        """Gradients do not matter here."""

    @property
    def launches(self) -> list[Launch]:
        """Every launch of the pass, in order."""
        block = launch.SCALARS_BLOCK
        spec = launch.KernelSpec("average_scalars", average.average_scalars_kernel, (("BLOCK", block),))
        hypers = self.hypers.values.tensor, self.hypers.addresses.tensor
        args = (self.rows.tensor, *hypers, self.scalars, self._skipped, self.counts)
        return [(spec, -(-len(self.segments) // block), args), *self._averages]

    def _average_launches(self) -> list[Launch]:
        out: list[Launch] = []
        for (weights, dtype), members in self._by(self._format).items():
            chunks = self._chunk_map(members, table.MEASURE_COUNT.value)
            if len(chunks):
                out.append((_average_spec(weights, dtype), len(chunks), (self.rows.tensor, chunks, self.scalars)))
        return out

    def _format(self, s: Segment) -> tuple[WeightFormat | None, torch.dtype]:
        return s.weight_format, s.weight.dtype

    def run(self, skipped: Tensor | None = None) -> None:
        """The pass, on the current stream of the device. skipped: one fp64 number, not 0 if the step was skipped."""
        if skipped is not None:
            self._skipped = skipped
        self.hypers.renew()
        self._start(self.launches)


def _average_spec(form: WeightFormat | None, dtype: torch.dtype) -> launch.KernelSpec:
    weight, compute = weight_codec(form, dtype), triton_type(compute_type(dtype))
    shape = tuning.shape((weight[2], compute))
    items = (
        ("WEIGHT", weight),
        ("COMPUTE", compute),
        ("CHUNK", table.CHUNK),
        ("BLOCK", shape.block),
        ("TAIL", shape.tail),
        ("SOURCES", launch.sources(weight)),
    )
    return launch.KernelSpec("average", average.average_kernel, items, shape.warps)


class EagerAverages:
    """The same for all averaged segments of one device without kernels."""

    def __init__(self, segments: Sequence[Segment], groups: Sequence[GroupOptions]) -> None:
        self.segments, self.groups = segments, groups
        lengths = [s.numel for s in segments]
        self.tasks = tasks_of(lengths)
        self.device = segments[0].weight.device
        self.workers = Workers(max(lengths), self.device)
        self.ports = [_ports(s) for s in segments]

    def set_hypers(self, indices: Sequence[int]) -> None:
        """Hyper-parameters are read at each run."""

    def run(self, skipped: bool | Tensor) -> None:
        """The pass, unless the step was skipped."""
        if skipped:
            return
        numbers = {i: self.groups[i].numbers for i in {s.group for s in self.segments}}
        decays = {i: (float(x[table.EMA_DECAY.value]), x[table.EMA_WARMUP.value]) for i, x in numbers.items()}
        programs: list[Program] = []
        for s in self.segments:
            assert s.ema_step is not None
            n = s.ema_step.item()
            s.ema_step.fill_(n + 1.0)
            decay, warmup = decays[s.group]
            programs.append(_program(s, average.ema_weight_eager(decay, warmup, n)))

        def renew(task: Task, lane: Lane) -> None:
            index, low, high = task
            programs[index].run([port.load(low, high, lane) for port in self.ports[index]], lane)

        self.workers.run(renew, self.tasks)


def _ports(s: Segment) -> tuple[Port, Port]:
    """Parameter, which is only read, and average, which has the compute type and is written where it is."""
    assert s.ema is not None
    compute = compute_type(s.weight.dtype)
    return weight_port(s), Port(s.ema, compute)


def _program(s: Segment, weight: float) -> Program:
    compute = compute_type(s.weight.dtype)
    tape = Tape(2)
    p, old = Values(tape, 0), Values(tape, 1)
    result = average.renew_eager(old, p, scalar_type(compute)(weight))
    return tape.program([(result, old)], compute, s.weight.device)
