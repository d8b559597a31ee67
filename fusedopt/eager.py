"""The whole step without kernels, composed from the same parts: eager twins run over blocks (``blocks.py``)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fusedopt_kernels.numerics import compute_type

from .blocks import Lane, Port, Task, Workers, tasks_of
from .groups import GroupOptions
from .norm import clip_coefficient, eager_norm, square_sum
from .plan import Segment
from .rule import Rule
from .tables import transforms
from .values import Program, Tape, Values, scalar_type

Scalars = tuple[Any, ...]


class EagerStep:
    """Runs the segments of one device with eager twins."""

    def __init__(self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions]) -> None:
        self.rule, self.segments, self.groups = rule, segments, groups
        options = groups[segments[0].group].options
        self.max_norm = float(options.get("max_norm", float("inf")))
        self.skip_nonfinite = bool(options.get("skip_nonfinite", False))
        self.with_norm = "max_norm" in options or "skip_nonfinite" in options
        lengths = [s.numel for s in segments]
        self.tasks = tasks_of(lengths)
        self.workers = Workers(max(lengths), segments[0].weight.device)
        self.ports = [_ports(s) for s in segments]
        self._programs: dict[Any, Program] = {}
        self._scalars: dict[tuple[int, float], tuple[float, ...]] = {}

    def set_hypers(self, indices: Sequence[int]) -> None:
        """Hyper-parameters are read when scalars are computed; nothing to upload."""

    def run(self, grads: list[Tensor]) -> None:
        """One step over all segments; ``grads`` are those of the whole plan, by segment position."""
        own = [grads[s.position] for s in self.segments]
        clip = 1.0
        if self.with_norm:
            norm, finite = eager_norm(own, self.workers)
            if not finite and self.skip_nonfinite:
                return
            clip = clip_coefficient(norm, self.max_norm)
        self._scalars.clear()
        self._programs.clear()
        ports = [
            (Port(g, first[0].compute), *first) for g, first in zip(own, self.ports, strict=True)
        ]  # gradient, parameter, state
        with np.errstate(all="ignore"):  # scalars may be infinite, as on the device
            numbers = [self._numbers(s, clip) for s in self.segments]
            if self.rule.n_norms:
                norms = self._norms(ports, numbers)
                numbers = [(e, (*s, *n)) for (e, s), n in zip(numbers, norms, strict=True)]
            programs = [self._program(s, *n) for s, n in zip(self.segments, numbers, strict=True)]

        def update(task: Task, lane: Lane) -> None:
            index, low, high = task
            arrays = [port.load(low, high, lane) for port in ports[index]]
            programs[index].run(arrays, lane)
            for port, array in zip(ports[index][1:], arrays[1:], strict=True):
                port.store(low, high, array)

        self.workers.run(update, self.tasks)

    # ------------------------------------------------------------------------------------------------- scalars
    def _numbers(self, segment: Segment, clip: float) -> tuple[Scalars, Scalars]:
        """Engine scalars (coefficient, l2, decay) and the rule's own in the compute type, after counting this step."""
        t = 1.0
        if segment.counter is not None:
            t = segment.counter.item() + 1.0
            segment.counter.fill_(t)
        key = (segment.group, t)
        known = self._scalars.get(key)
        if known is None:
            group = self.groups[segment.group]
            hyper = tuple(float(h) for h in group.hypers)
            l2 = 0.0 if group.decoupled or self.rule.decay == "own" else hyper[1]
            decay = hyper[0] * hyper[1] if group.decoupled else 0.0
            known = self._scalars[key] = (clip, l2, decay, *self.rule.scalars_eager(hyper, t))
        number = scalar_type(compute_type(segment.weight.dtype))
        values = tuple(map(number, known))
        return values[:3], values[3:]

    def _norms(self, ports: Any, numbers: Sequence[tuple[Scalars, Scalars]]) -> list[Scalars]:
        """First pass of a two-pass rule: L2 norms over each segment, summed in fp64, block after block."""
        programs = [self._measure(s, *n) for s, n in zip(self.segments, numbers, strict=True)]
        sums: dict[Task, list[float]] = {}

        def measure(task: Task, lane: Lane) -> None:
            index, low, high = task
            arrays = [port.load(low, high, lane) for port in ports[index]]
            found = [lane.take(ports[index][0].compute, high - low) for _ in range(self.rule.n_norms)]
            programs[index].run([*arrays, *found], lane)
            sums[task] = [square_sum(x, lane) for x in found]

        self.workers.run(measure, self.tasks)
        totals = [[0.0] * self.rule.n_norms for _ in self.segments]
        for task in self.tasks:
            totals[task.index] = [a + b for a, b in zip(totals[task.index], sums[task], strict=True)]
        return [
            tuple(scalar_type(p[0].compute)(np.sqrt(x)) for x in total) for p, total in zip(ports, totals, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------ programs
    def _program(self, segment: Segment, e: Scalars, s: Scalars) -> Program:
        """What the update does to a block; segments with the same scalars share it."""
        key = (segment.group, segment.weight.dtype, e, s)
        if key not in self._programs:
            tape, g, p, state = self._tape(segment, e)
            descent, new = self.rule.update_eager(g, p, state, s, self.groups[segment.group].variant)
            if e[2] != 0.0:
                descent = descent + e[2] * p
            results = [*zip(new, state, strict=True), (p - descent, p)]
            self._programs[key] = tape.program(results, compute_type(segment.weight.dtype), segment.weight.device)
        return self._programs[key]

    def _measure(self, segment: Segment, e: Scalars, s: Scalars) -> Program:
        """What a two-pass rule measures in a block, each in an array of its own."""
        assert self.rule.measure_eager is not None
        tape, g, p, state = self._tape(segment, e, extra=self.rule.n_norms)
        values = self.rule.measure_eager(g, p, state, s, self.groups[segment.group].variant)
        first = 2 + len(state)
        results = [(x, Values(tape, first + i)) for i, x in enumerate(values)]
        return tape.program(results, compute_type(segment.weight.dtype), segment.weight.device)

    def _tape(self, segment: Segment, e: Scalars, extra: int = 0) -> tuple[Tape, Values, Values, tuple[Values, ...]]:
        """A new tape with transformed gradient, parameter and state; ``extra`` inputs come after these."""
        group = self.groups[segment.group]
        tape = Tape(2 + len(segment.slots) + extra)
        g, p, *state = (Values(tape, i) for i in range(2 + len(segment.slots)))
        for transform in transforms(self.with_norm, group.decoupled, self.rule.decay == "own"):
            g = transform.apply_eager(g, p, int(group.maximize) << 1, e)
        return tape, g, p, tuple(state)


def _ports(segment: Segment) -> list[Port]:
    """Parameter and state slots."""
    compute = compute_type(segment.weight.dtype)
    return [Port(segment.weight, compute, segment.residual), *(Port(t, compute) for t in segment.slots)]
