"""Parts of a step whose parameters are shared out among ranks: the same, but that sums go over the ranks."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import launch, table
from fusedopt_kernels.step import measure_kernel, update_kernel

from .blocks import Task
from .eager import EagerStep
from .groups import GroupOptions
from .metrics import Metrics, Report
from .norm import Blocks, Sums, eager_blocks, joined
from .numbers import Shared
from .ranks import Reach, TensorSums
from .rule import Rule
from .segment import Segment
from .tables import DeviceTables, Launch

SUM = table.NORM_TWO.value
"""A kind of norm whose partial results are added up."""


class ShardTables(DeviceTables):
    """Tables and launches for segments of which some are shared out.

    by_tensor: norms of single gradients are wanted; their sums go over the ranks before anything is made of them.
    """

    def __init__(self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], shared: Shared) -> None:
        self.reach = shared.reach
        self.by_tensor = self.reach.by_tensor(rule, segments, groups, shared.metrics)
        super().__init__(rule, segments, groups, shared)
        self._sums, rows = TensorSums(segments, self._constant), self.rows.array
        self._norms = self._constant(2 * rows[:, table.NORM_START.value])  # first partial of each
        full = np.flatnonzero(rows[:, table.MEASURE_COUNT.value])
        self._full, self._measures = self._constant(full), self._constant(rows[full, table.MEASURE_START.value])
        self._change_sums: Tensor | None = None
        self._passes: dict[int, list[Launch]] = {}

    def _norm_blocks(self, s: Segment) -> int:
        """None where another rank counts the gradient, one at least to hold the sum of its ranks."""
        if self.by_tensor:
            return max(1, super()._norm_blocks(s))
        return super()._norm_blocks(s) if self.reach.counts(s) else 0

    def sum_by_tensor(self, grads: Sequence[Tensor], kind: int) -> None:
        """The norm pass, ahead of everything; each gradient's sum over its ranks becomes its first partial."""
        if kind not in self._passes:
            self.summed = False
            self._passes[kind] = self._norm_launches(kind, False)
            self.summed = True
        self._start(self._passes[kind])
        squares, bad = self.partials[: 2 * self.n_partials].view(-1, 2).unbind(1)
        if kind == table.NORM_INF.value:  # as integers, which keep their order and NaN above all
            counts = self.rows.tensor[:, table.NORM_COUNT.value]
            places = torch.repeat_interleave(counts, output_size=self.n_partials)
            bits = squares.contiguous().view(torch.int64)
            own = torch.zeros(len(self.segments), dtype=torch.int64, device=self.device)
            own = own.scatter_reduce_(0, places, bits, "amax").view(torch.float64)
        else:
            own = self._by_segment(squares.contiguous(), table.NORM_COUNT.value)
        found = bad.amax(0, keepdim=True)
        self._sums.join(own, kind, found)
        self.partials.zero_()
        self.partials.index_copy_(0, self._norms, own)
        self.partials[1:2].copy_(found)

    def run(self) -> None:
        """Launch the step; sums that a rule or a cautious step takes of whole tensors go over the ranks in between."""
        self.hypers.renew()
        self.conditions.renew()
        launches = [x for x in self.launches if not _updates(x[0])]
        self._start(launches)
        if any(spec.fn is measure_kernel for spec, _, _ in launches):
            self._join_measures()
        self._start([x for x in self.launches if _updates(x[0])])
        if self.change is not None:
            self._change_sums = self._by_segment(self.change[: self.n_chunks])
            self._sums.join(self._change_sums, SUM)

    def _join_measures(self) -> None:
        n = self.rule.n_norms or 1
        values = self.partials[: self.n_chunks * n].view(-1, n)
        own = self._by_segment(values)
        self._sums.join(own, SUM)
        values.zero_().index_copy_(0, self._measures, own.index_select(0, self._full))

    def report(self) -> Report:
        """As `Rows.report`; norms of parameters and their change are those of whole tensors."""
        return super().report()._replace(change=self._change_sums)


def _updates(spec: launch.KernelSpec) -> bool:
    """Whether a launch is the last pass over its parameters."""
    return spec.fn is update_kernel


class ShardEager(EagerStep):
    """The same with eager twins."""

    def __init__(
        self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], metrics: Metrics, reach: Reach
    ) -> None:
        super().__init__(rule, segments, groups, metrics)
        self.reach = reach
        self.by_tensor = reach.by_tensor(rule, segments, groups, metrics)
        self._over = TensorSums(segments, torch.from_numpy)

    def totals(self, grads: list[Tensor], kind: int) -> Sums:
        """Sums over what this rank counts; all of it once single tensors' sums went over their ranks."""
        if not self.summed:
            few = [i for i, s in enumerate(self.segments) if self.reach.counts(s)]
            found = eager_blocks([grads[self.segments[i].position] for i in few], self.workers, kind)
            self.blocks = [Blocks([], True)] * len(self.segments)
            for i, blocks in zip(few, found, strict=True):
                self.blocks[i] = blocks
        summed, self.summed = self.summed, True
        sums = super().totals(grads, kind)
        self.summed = summed
        return sums

    def sum_by_tensor(self, grads: Sequence[Tensor], kind: int) -> None:
        """As `ShardTables.sum_by_tensor`."""
        blocks = eager_blocks([grads[s.position] for s in self.segments], self.workers, kind)
        self.summed = True
        sums = joined(blocks, kind)
        own = torch.tensor(sums.own, dtype=torch.float64)
        found = torch.tensor([sums.bad], dtype=torch.float64)
        self._over.join(own, kind, found)
        self.blocks = [Blocks([x], not found.item()) for x in own.tolist()]

    def _by_segment(self, sums: Mapping[Task, Sequence[float]], n: int) -> list[list[float]]:
        """As `EagerStep._by_segment`, over the ranks of each."""
        totals = torch.tensor(super()._by_segment(sums, n), dtype=torch.float64).view(-1, n)
        self._over.join(totals, SUM)
        return totals.tolist()
