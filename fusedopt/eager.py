"""The whole step without kernels, composed from the same parts: eager twins run over blocks (``blocks.py``)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import table
from fusedopt_kernels.numerics import REAL_TYPE, compute_type

from .blocks import Lane, Task, Workers, as_array, as_tensor, longest, tasks_of
from .conditions import Conditions, StepNumbers
from .groups import GroupOptions
from .metrics import Metrics, Report, of_numbers
from .norm import Blocks, Sums, clip_coefficient, eager_blocks, joined, norm_of, square_sum
from .ports import Port, slot_port, weight_port
from .rule import Rule
from .segment import Segment
from .tables import transforms
from .values import Program, Tape, Values, scalar_type, where_eager

Scalars = tuple[Any, ...]


class EagerStep:
    """Runs the segments of one device with eager twins.

    blocks: sums over this part's gradients, by segment; summed: they are this step's already, see ``source.py``.
    """

    summed = False

    def __init__(
        self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], metrics: Metrics
    ) -> None:
        self.rule, self.segments, self.groups = rule, segments, groups
        self.ports = [_ports(s) for s in segments]
        units = [math.lcm(*(port.unit for port in ports)) for ports in self.ports]
        lengths = [s.numel for s in segments]
        self.tasks = tasks_of(lengths, units)
        self.workers = Workers(max(lengths), segments[0].weight.device, longest(self.tasks))
        self._sums = Sums(0.0, 0.0, [])
        self.blocks: list[Blocks] = []
        self._scaled = False
        self._step = StepNumbers(1.0, 0.0, False, False, False)
        self._clips: list[float] = []
        self._norms: list[float] | None = None
        self._kind = table.NORM_TWO.value
        self._change = [[math.nan] * 2 for _ in segments] if metrics.change else None
        self.tally: Tensor | None = None
        self._programs: dict[Any, Program] = {}
        self._scalars: dict[tuple[int, float], tuple[float, ...]] = {}

    def set_hypers(self, indices: Sequence[int]) -> None:
        """Hyper-parameters are read when scalars are computed; nothing to upload."""

    @property
    def skipped(self) -> bool:
        """Whether the last step was."""
        return self._step.skip

    @property
    def found(self) -> Tensor:
        """Whether a gradient of the last step held inf or NaN: 1.0 or 0.0, 0-dim fp32."""
        return torch.tensor(float(self._step.bad), dtype=torch.float32, device="cpu")

    def report(self) -> Report:
        """What the last step measured."""
        params = [s.param for s in self.segments]
        norm, clips = (self._step.norm, self._clips) if self._step.with_norm else (None, None)
        return of_numbers(params, norm, clips, self._norms, self._change, self._kind)

    def totals(self, grads: list[Tensor], kind: int) -> Sums:
        """Sums over this part's gradients; ``grads`` are those of the whole plan, by segment position."""
        with np.errstate(all="ignore"):
            if not self.summed:
                self.blocks = eager_blocks([grads[s.position] for s in self.segments], self.workers, kind)
            self._sums = joined(self.blocks, kind)
        return self._sums

    def run(self, grads: list[Tensor], conditions: Conditions) -> None:
        """One step over all segments under a step's conditions; after `totals` where the norm is of several parts."""
        own = [grads[s.position] for s in self.segments]
        wide = any(REAL_TYPE.get(g.dtype, g.dtype) == torch.float64 for g in own)
        use = conditions.use(self.rule, any(self.groups[s.group].clips_alone for s in self.segments))
        needs_own = use.own or self.rule.grad_norm
        if conditions.norm_mode == table.OWN_NORM.value or (needs_own and use.mode != table.SUMMED_NORM.value):
            self.totals(grads, use.kind)
        with np.errstate(all="ignore"):  # norms and scalars may be infinite, as on the device
            step = StepNumbers.of(conditions, self._sums, wide)
            if self.rule.grad_norm and not step.with_norm:  # the norm pass runs for the rule
                step = step._replace(bad=self._sums.bad > 0.0)
            self._step = step
            self._kind, self._scaled = use.kind, use.scaled or use.with_norm
            norms = [norm_of(x, wide, use.kind) * step.inverse for x in self._sums.own] if needs_own else None
            self._norms, each = norms, norms or [step.norm] * len(own)
            self._clips = [self._clip(s, step, norm) for s, norm in zip(self.segments, each, strict=True)]
            self._count()
            if step.skip:
                self.measure_unchanged()
                return
            self._scalars.clear()
            self._programs.clear()
            ports = [
                (Port(g, first[0].compute), *first) for g, first in zip(own, self.ports, strict=True)
            ]  # gradient, parameter, state, mask
            numbers = [self._numbers(i, step, *x) for i, x in enumerate(zip(each, self._clips, strict=True))]
            if self.rule.n_norms or any(group.cautious for group in self.groups):
                numbers = self._measured(ports, numbers)
            programs = [self._program(s, *n) for s, n in zip(self.segments, numbers, strict=True)]
        self._update(ports, programs)

    def _update(self, ports: Sequence[tuple[Port, ...]], programs: Sequence[Program]) -> None:
        """The second pass, or the only one."""
        changes: dict[Task, tuple[float, float]] = {}

        def update(task: Task, lane: Lane) -> None:
            index, low, high = task
            arrays = [port.load(low, high, lane) for port in ports[index]]
            before = None
            if self._change is not None:
                before = lane.take(ports[index][1].compute, high - low)
                as_tensor(before).copy_(as_tensor(arrays[1]))
            programs[index].run(arrays, lane)
            written = 2 + len(self.segments[index].slots)
            for port, array in zip(ports[index][1:written], arrays[1:written], strict=True):
                port.store(low, high, array)
            if before is not None:
                held = as_tensor(ports[index][1].load(low, high, lane))
                change = as_array(torch.sub(held, as_tensor(before), out=as_tensor(before)))
                changes[task] = square_sum(as_array(held), lane), square_sum(change, lane)

        self.workers.run(update, self.tasks)
        if self._change is not None:
            self._change = self._by_segment(changes, 2)

    def measure_unchanged(self) -> None:
        """Squares of the weights in a skipped step; their change is 0."""
        if self._change is None:
            return
        squares: dict[Task, tuple[float, float]] = {}

        def measure(task: Task, lane: Lane) -> None:
            squares[task] = square_sum(self.ports[task.index][0].load(task.low, task.high, lane), lane), 0.0

        self.workers.run(measure, self.tasks)
        self._change = self._by_segment(squares, 2)

    def _by_segment(self, sums: Mapping[Task, Sequence[float]], n: int) -> list[list[float]]:
        """n sums over each segment, of those over its blocks, in order."""
        totals = [[0.0] * n for _ in self.segments]
        for task in self.tasks:
            if task in sums:
                totals[task.index] = [a + b for a, b in zip(totals[task.index], sums[task], strict=True)]
        return totals

    def _count(self) -> None:
        """Renew the running counts: see ``table.py``."""
        if self.tally is not None:
            step = self._step
            clipped = not step.skip and any(clip < 1.0 for clip in self._clips)
            self.tally += torch.tensor([1, clipped, step.skip, step.bad], dtype=torch.float64, device="cpu")

    def _clip(self, segment: Segment, step: StepNumbers, norm: float) -> float:
        """What norm clipping multiplies a segment's gradient with; norm: its own."""
        group = self.groups[segment.group]
        limit = float(group.numbers[table.CLIP_NORM.value]) if step.with_norm else math.inf
        return clip_coefficient(norm if group.clips_alone else step.norm, limit)

    def _numbers(self, index: int, step: StepNumbers, norm: float, clip: float) -> tuple[Scalars, Scalars]:
        """Engine scalars (see ``coefficient.py``) and the rule's own in the compute type, after counting this step."""
        t, segment = 1.0, self.segments[index]
        if segment.counter is not None:
            t = segment.counter.item() + (0.0 if segment.counted else 1.0)
            segment.counter.fill_(t)
        for port in self.ports[index]:
            if port.noise is not None:
                port.noise.step = int(t)
        group = self.groups[segment.group]
        key = (segment.group, t)
        known = self._scalars.get(key)
        if known is None:
            numbers = {column: float(x) for column, x in group.numbers.items()}
            hyper = tuple(float(h) for h in group.hypers)
            rules = self._rule_scalars(segment, hyper, t, norm * clip)
            share = (*rules, hyper[0] * hyper[1])[self.rule.n_scalars]
            if group.independent:
                share = hyper[1] * (hyper[0] / numbers[table.LR_INITIAL.value])
            known = (
                step.inverse * clip,
                0.0 if group.decoupled or self.rule.decay == "own" else hyper[1],
                share if group.decoupled else 0.0,
                numbers[table.L1.value],
                numbers[table.CLIP_VALUE.value],
                *rules[: self.rule.n_scalars],
            )
            if not (segment.numbers or self.rule.grad_norm or group.clips_alone):
                self._scalars[key] = known
        number = scalar_type(compute_type(segment.weight.dtype))
        values = tuple(map(number, known))
        return values[:5], values[5:]

    def _rule_scalars(self, segment: Segment, hyper: Scalars, t: float, norm: float) -> tuple[float, ...]:
        """The rule's own scalars; renews the segment's scalar slots."""
        if not segment.numbers:
            return self.rule.scalars_eager(hyper, t)
        state = tuple(x.item() for x in segment.numbers)
        more = (norm,) if self.rule.grad_norm else ()
        scalars, new = self.rule.scalars_eager(hyper, t, state, *more)
        for tensor, value in zip(segment.numbers, new, strict=True):
            tensor.fill_(value)
        return scalars

    def _measured(self, ports: Any, numbers: Sequence[tuple[Scalars, Scalars]]) -> list[tuple[Scalars, Scalars]]:
        """First pass: sums of squares over each segment in fp64, block after block, and what follows from them.

        A two-pass rule gets its norms and the element count; a cautious segment the scale of what agrees.
        """
        n_sums = self.rule.n_norms or 1
        wanted = {i for i, s in enumerate(self.segments) if self.rule.n_norms or self.groups[s.group].cautious}
        programs = {i: self._measure(self.segments[i], *numbers[i]) for i in wanted}
        tasks = [task for task in self.tasks if task.index in wanted]
        sums: dict[Task, list[float]] = {}

        def measure(task: Task, lane: Lane) -> None:
            index, low, high = task
            arrays = [port.load(low, high, lane) for port in ports[index]]
            found = [lane.take(ports[index][0].compute, high - low) for _ in range(n_sums)]
            programs[index].run([*arrays, *found], lane)
            sums[task] = [square_sum(x, lane) for x in found]

        self.workers.run(measure, tasks)
        totals = self._by_segment(sums, n_sums)
        result = list(numbers)
        for i in wanted:
            (e, s), n = numbers[i], self.segments[i].whole_numel
            number = scalar_type(ports[i][0].compute)
            if self.rule.n_norms:
                result[i] = e, (*s, *(number(np.sqrt(x)) for x in totals[i]), number(n))
            else:
                result[i] = (*e, number(n / (totals[i][0] + 1.0))), s
        return result

    # ------------------------------------------------------------------------------------------------ programs
    def _program(self, segment: Segment, e: Scalars, s: Scalars) -> Program:
        """What the update does to a block; segments with the same scalars share it."""
        group = self.groups[segment.group]
        key = (segment.group, segment.weight.dtype, segment.mask is None, e, s)
        if key not in self._programs:
            tape, g, p, state = self._tape(segment, e, extra=segment.mask is not None)
            descent, new = self.rule.update_eager(g, p, state, s, group.variant)
            if group.cautious:
                descent = where_eager(_agrees(descent, g), descent * e[5], descent * 0.0)
            if e[2] != 0.0:
                total = descent + e[2] * p
                descent = where_eager(_agrees(descent, 0.0 - p), descent, total) if group.cautious_decay else total
            x = p - descent
            if segment.mask is not None:
                x = where_eager(Values(tape, 2 + len(state)), x, p)
            results = [*zip(new, state, strict=True), (x, p)]
            self._programs[key] = tape.program(results, compute_type(segment.weight.dtype), segment.weight.device)
        return self._programs[key]

    def _measure(self, segment: Segment, e: Scalars, s: Scalars) -> Program:
        """What is measured in a block, each in an array of its own: see `_measured`."""
        group, n_sums = self.groups[segment.group], self.rule.n_norms or 1
        masked = segment.mask is not None
        tape, g, p, state = self._tape(segment, e, extra=n_sums + masked)
        if self.rule.n_norms:
            assert self.rule.measure_eager is not None
            values = self.rule.measure_eager(g, p, state, s, group.variant)
        else:
            values = (_agrees(self.rule.update_eager(g, p, state, s, group.variant)[0], g),)
        first = 2 + len(state) + masked
        results = [(x, Values(tape, first + i)) for i, x in enumerate(values)]
        return tape.program(results, compute_type(segment.weight.dtype), segment.weight.device)

    def _tape(self, segment: Segment, e: Scalars, extra: int = 0) -> tuple[Tape, Values, Values, tuple[Values, ...]]:
        """A new tape with transformed gradient, parameter and state; ``extra`` inputs come after these."""
        group = self.groups[segment.group]
        tape = Tape(2 + len(segment.slots) + extra)
        g, p, *state = (Values(tape, i) for i in range(2 + len(segment.slots)))
        for transform in transforms(group, self._scaled):
            g = transform.apply_eager(g, p, int(group.maximize) << 1, e)
        return tape, g, p, tuple(state)


def _agrees(a: Any, b: Any) -> Values:
    """Whether both are non-zero and of one sign."""
    return a.sign() * b.sign() > 0.0


def _ports(segment: Segment) -> list[Port]:
    """Parameter, state slots, and the mask where there is one."""
    compute = compute_type(segment.weight.dtype)
    mask = [] if segment.mask is None else [Port(segment.mask, compute)]
    return [weight_port(segment), *(slot_port(segment, i) for i in range(len(segment.slots))), *mask]
