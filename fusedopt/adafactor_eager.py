"""The step of Adafactor on one device, with eager twins; as ``adafactor_step.py``, in the same order.

Sums over rows and columns are fp64, so moments agree bit for bit with the kernels' except where a sum lies within
some 1e-16 of the middle between two numbers of the state's dtype; given equal moments and norms, so do parameters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels.numerics import average_eager, compute_type

from . import layout
from .adafactor_step import of_dtype, split, stack_of
from .blocks import BLOCK, Lane, Task, as_tensor
from .derived import with_group
from .eager import EagerStep, Scalars
from .groups import GroupOptions
from .metrics import Metrics
from .ports import Port
from .rule import Rule
from .segment import Segment
from .tables import transforms
from .values import Program, Tape, Values

Box = tuple[slice, slice, slice]
"""Matrices, rows and columns that a task covers."""


def tasks_in(index: int, stack: tuple[int, int, int]) -> list[Task]:
    """Tasks of a stack of matrices: several of them, several rows of one, or a piece of one row."""
    _, rows, columns = stack
    n, matrix = stack[0] * rows * columns, rows * columns
    if matrix <= BLOCK:
        span, size = n, max(1, matrix) * (BLOCK // max(1, matrix))
    elif columns <= BLOCK:
        span, size = matrix, columns * (BLOCK // columns)
    else:
        span, size = columns, BLOCK
    return [
        Task(index, low, min(low + size, start + span))
        for start in range(0, n, max(1, span))
        for low in range(start, start + span, size)
    ]


def box_of(low: int, high: int, stack: tuple[int, int, int]) -> tuple[Box, tuple[int, int, int]]:
    """Where the task from ``low`` to ``high`` lies in its stack, and its shape."""
    _, rows, columns = stack
    line, n = low // columns, high - low
    first, i, j = line // rows, line % rows, low % columns
    if n > rows * columns or ((i, j) == (0, 0) and n == rows * columns):
        shape = n // (rows * columns), rows, columns
    else:
        shape = 1, max(1, n // columns), min(n, columns)
    return (slice(first, first + shape[0]), slice(i, i + shape[1]), slice(j, j + shape[2])), shape


class _Variance(Port):
    """Estimates of a stack's variances, computed where they are needed; they take the place of a state slot."""

    def __init__(self, segment: Segment) -> None:
        self.slots, self.stack = segment.slots, stack_of(segment.weight.shape)
        self.compute = compute_type(segment.weight.dtype)

    def renew(self, sums: tuple[Tensor, Tensor], w: float, smallest: float) -> None:
        """Take this step's sums of squares of rows and columns, (matrices, rows) and (matrices, columns)."""
        many, rows, columns = self.stack
        for slot, total, over in zip(self.slots, sums, (columns, rows), strict=True):
            flat = layout.flat(slot)
            flat.copy_(average_eager(flat.double(), total.view(-1) / over, w))
        lines = layout.flat(self.slots[0]).double().view(many, rows)
        mean = lines.sum(-1, keepdim=True) / rows
        self.lines = (lines / mean.clamp(min=smallest)).to(self.compute)
        self.columns = layout.flat(self.slots[1]).to(self.compute).view(many, columns)

    def load(self, low: int, high: int, lane: Lane) -> Any:
        """Variances of elements low … high."""
        (many, rows, columns), shape = box_of(low, high, self.stack)
        array = lane.take(self.compute, high - low)
        out = as_tensor(array).view(shape)
        torch.mul(self.lines[many, rows, None], self.columns[many, None, columns], out=out)
        return array

    def store(self, low: int, high: int, array: Any) -> None:
        """Nothing changes."""


class VectorEager(EagerStep):
    """Runs vectors and scalars by an ordinary rule of two passes."""

    def __init__(
        self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], metrics: Metrics
    ) -> None:
        self.derived, moved = of_dtype(rule, segments, groups)
        super().__init__(rule, moved, self.derived.list, metrics)

    def set_hypers(self, indices: Sequence[int]) -> None:
        """Take the current hyper-parameters of some groups of the plan."""
        self.derived.renew(indices)


class FactoredEager(VectorEager):
    """Runs stacks of matrices: a pass for the sums, then two as for an ordinary rule."""

    def __init__(
        self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], metrics: Metrics
    ) -> None:
        seen = [with_group(s, s.group) for s in segments]
        for s in seen:
            s.slots = s.slots[:1]  # its place is taken by the variances
        super().__init__(rule, seen, groups, metrics)
        self.variances = [_Variance(s) for s in segments]
        self.tasks = [task for i, v in enumerate(self.variances) for task in tasks_in(i, v.stack)]
        for ports, variance in zip(self.ports, self.variances, strict=True):
            ports[1:2] = [variance]

    def _measured(self, ports: Any, numbers: Sequence[tuple[Scalars, Scalars]]) -> list[tuple[Scalars, Scalars]]:
        """Renew the moments before what is measured."""
        sums = self._sums_of_squares([gradient for gradient, *_ in ports], [e for e, _ in numbers])
        for s, variance, own in zip(self.segments, self.variances, sums, strict=True):
            assert s.counter is not None
            hyper = tuple(float(h) for h in self.groups[s.group].hypers)
            w, smallest, *_ = self.rule.scalars_eager(hyper, s.counter.item())
            if s.numel:
                variance.renew(own, w, smallest)
        return super()._measured(ports, numbers)

    def _sums_of_squares(self, ports: Sequence[Port], e: Sequence[Scalars]) -> list[tuple[Tensor, Tensor]]:
        """Of transformed gradients, sums over rows and over columns, fp64, by segment."""
        programs = [self._transformed(s, x) for s, x in zip(self.segments, e, strict=True)]
        found: dict[Task, tuple[Any, Any]] = {}

        def add(task: Task, lane: Lane) -> None:
            index, low, high = task
            g = lane.take(ports[index].compute, high - low)
            programs[index].run([ports[index].load(low, high, lane), g], lane)
            squares = _squares(g, lane).reshape(box_of(low, high, self.variances[index].stack)[1])
            found[task] = squares.sum(-1), squares.sum(-2)

        self.workers.run(add, self.tasks)
        sums = [self._zeros(v.stack) for v in self.variances]
        for task in self.tasks:
            (many, rows, columns), _ = box_of(task.low, task.high, self.variances[task.index].stack)
            sums[task.index][0][many, rows] += as_tensor(found[task][0])
            sums[task.index][1][many, columns] += as_tensor(found[task][1])
        return sums

    def _transformed(self, segment: Segment, e: Scalars) -> Program:
        """Writes the transformed gradient into a second array."""
        tape, group = Tape(2), self.groups[segment.group]
        g: Any = Values(tape, 0)
        for transform in transforms(group, self._scaled):
            g = transform.apply_eager(g, None, int(group.maximize) << 1, e)
        return tape.program([(g, Values(tape, 1))], compute_type(segment.weight.dtype), segment.weight.device)

    def _zeros(self, stack: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        device = self.segments[0].weight.device
        many, rows, columns = stack
        zeros = [torch.zeros((many, n), dtype=torch.float64, device=device) for n in (rows, columns)]
        return zeros[0], zeros[1]


def _squares(x: np.ndarray | Tensor, lane: Lane) -> Any:
    """Squares in fp64."""
    if isinstance(x, Tensor):
        return x.double().square()
    squares = lane.take(torch.float64, len(x))
    np.copyto(squares, x)
    return np.multiply(squares, squares, squares)


def parts(
    rules: tuple[Rule, Rule], rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions],
    metrics: Metrics,
) -> list[VectorEager]:  # fmt: skip
    """The parts of the step; rules: that of matrices, that of vectors."""
    kinds = zip((FactoredEager, VectorEager), rules, split(segments, groups), strict=True)
    return [kind(inner, few, groups, metrics) for kind, inner, few in kinds if few]
