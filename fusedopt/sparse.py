"""Sparse COO gradients (embeddings): only the rows they touch are updated.

A gradient is coalesced (torch's, which reads its number of rows back from a GPU), then all parameters with sparse
gradients take one scalars launch and one gather–update–scatter launch per variant. The result is that of the dense
rule wherever a row without gradient stays as it is: plain SGD, Adagrad, SparseAdam. SGD with momentum moves every
row, as torch's does, and is given every row. Under ``sparse="lazy"`` a rule sees a row only when it has a gradient:
its moments then do not decay in between, its weight decay acts on touched rows, its step count goes on.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import launch, table

from . import layout
from .conditions import Conditions
from .eager import EagerStep
from .groups import GroupOptions
from .metrics import Metrics, Report
from .norm import Sums
from .rows import filled, segment_counts
from .rule import Rule, switched_on
from .segment import Segment
from .tables import DeviceTables, Launch


def touched(s: Segment, options: GroupOptions) -> tuple[Tensor, Tensor]:
    """(row numbers, values of these rows) of a segment's gradient, both contiguous."""
    assert s.param.grad is not None
    grad = s.param.grad.coalesce()
    rule, shape = options.rule, s.param.shape
    moves_all = rule.moves_all is not None and switched_on(options.hyper(rule.moves_all))
    if moves_all and options.options.get("sparse") != "lazy":
        layout.warn_once(
            "dense momentum",
            f"{rule.name} with {rule.moves_all} moves every row of a parameter, also those without a gradient, as "
            "torch's does: its sparse gradient is made dense; sparse='lazy' moves touched rows only",
        )
        return torch.arange(shape[0], device=grad.device), grad.to_dense().contiguous()
    index = grad.indices()
    rows = index[0]
    for i in range(1, len(index)):
        rows = rows * shape[i] + index[i]
    return rows.contiguous(), grad.values().contiguous()


class SparseTables(DeviceTables):
    """Tables and launches for the segments of one device whose gradients are sparse."""

    def _update_launches(self) -> list[Launch]:
        """What follows the scalars launch depends on the rows touched."""
        out: list[Launch] = []
        for key, members in self._by(self._variant).items():
            pairs = self._pairs(members, table.MEASURE_COUNT.value)
            if len(pairs):
                chunks = torch.from_numpy(pairs).to(self.device)
                args = (self.rows.tensor, self.grads.tensor, chunks, self.scalars, self.partials)
                out.append((self._rows_spec(key), len(pairs), args))
        return out

    def set_gradients(self, addresses: list[int]) -> None:
        """Coalesce this step's gradients and lay out what follows from their sizes; ``addresses`` are of others."""
        self._found = [touched(s, self.groups[s.group]) for s in self.segments]
        rows = self.rows.array
        rows[:, table.FLAGS.value] = self.base_flags
        for row, (index, values) in zip(rows, self._found, strict=True):
            stored = values.numel() * (2 if values.is_complex() else 1)
            row[table.INDEX.value], row[table.NUMEL.value] = index.data_ptr(), stored
            length = row[table.ROW_LENGTH.value] = row[table.GLOBAL_STRIDE.value] = stored // max(1, len(index)) or 1
            row[table.MEASURE_COUNT.value] = -(-stored // length * filled(length) // table.CHUNK)
        counts = -(-rows[:, table.NUMEL.value] // table.NORM_CHUNK)
        rows[:, table.NORM_COUNT.value], rows[:, table.NORM_START.value] = counts, np.cumsum(counts) - counts
        self.grads.array[:] = [values.data_ptr() for _, values in self._found]
        self.rows.upload()
        self.grads.upload()
        self.counts = torch.from_numpy(segment_counts(counts)).to(self.device)
        self.partials = torch.zeros(max(1, 2 * int(counts.sum())), dtype=torch.float64, device=self.device)
        self._by_use.clear()
        self._totals.clear()

    def run(self) -> None:
        """Launch the step on the current stream of the device, and let go of the gradients."""
        super().run()
        self._found = []

    def _chunk_map(self, members: Sequence[int], counts: int) -> Tensor:
        return torch.from_numpy(self._pairs(members, counts)).to(self.device)

    def prepare(self) -> int:
        """Compile what a step would launch; returns how many kernels were not ready."""
        self.set_gradients([])
        return super().prepare()

    def prepare_totals(self, kind: int) -> int:
        """The same for `totals`."""
        self.set_gradients([])
        return super().prepare_totals(kind)

    def _rows_spec(self, key: Any) -> launch.KernelSpec:
        variant = replace(self._update_variant(key), rowwise=True, by_eight=False)
        return launch.update_spec(f"{self.rule.name}_rows", self.rule.update, variant, "rows")


class EagerRows:
    """The same with eager twins: touched rows are copied out, updated as dense segments and copied back."""

    def __init__(
        self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], metrics: Metrics
    ) -> None:
        self.rule, self.segments, self.groups, self.metrics = rule, segments, groups, metrics
        self.tally: Tensor | None = None
        self._gathered: tuple[list[Segment], list[tuple[Tensor, Tensor]]] | None = None

    def set_hypers(self, indices: Sequence[int]) -> None:
        """Hyper-parameters are read at each step."""

    def _gather(self) -> tuple[list[Segment], list[tuple[Tensor, Tensor]]]:
        """Touched rows as dense segments, and (rows, values) of the gradients; once in a step."""
        if self._gathered is None:
            found = [touched(s, self.groups[s.group]) for s in self.segments]
            self._gathered = [_gather(s, i, *found[i]) for i, s in enumerate(self.segments)], found
            self.step = EagerStep(self.rule, self._gathered[0], self.groups, self.metrics)
        return self._gathered

    @property
    def skipped(self) -> bool:
        """Whether the last step was."""
        return self.step.skipped

    @property
    def found(self) -> Tensor:
        """Whether a gradient of the last step held inf or NaN."""
        return self.step.found

    def report(self) -> Report:
        """What the last step measured."""
        return self.step.report()

    def totals(self, grads: list[Tensor], kind: int) -> Sums:
        """Sums over the gradients; ``grads`` are those of the dense segments and not used."""
        _, found = self._gather()
        return self.step.totals([values for _, values in found], kind)

    def run(self, grads: list[Tensor], conditions: Conditions) -> None:
        """One step; ``grads`` as in `totals`."""
        gathered, found = self._gather()
        self._gathered, self.step.tally = None, self.tally
        self.step.run([values for _, values in found], conditions)
        for s, small, (rows, _) in zip(self.segments, gathered, found, strict=True):
            for whole, part in zip(_written(s), _written(small), strict=True):
                _plain(whole).view(-1, part.shape[1]).index_copy_(0, rows, _plain(part))


def _gather(s: Segment, position: int, rows: Tensor, values: Tensor) -> Segment:
    """A dense segment of a sparse one's touched rows, with its step count and scalar slots."""
    length = values.numel() // len(rows) if len(rows) else 1

    def pick(t: Tensor) -> Tensor:
        return t.detach().view(-1, length * (t.numel() // s.weight.numel()) if len(rows) else 1)[rows]

    def whole(t: Tensor) -> Tensor:
        return t.view(t.shape[0], -1)[rows]

    small = Segment(s.param, s.group, position)
    small.weight = pick(s.weight)
    small.slots = [pick(t) if form is None else whole(t) for t, form in zip(s.slots, s.formats, strict=True)]
    small.scales = [None if t is None else whole(t) for t in s.scales]
    small.formats, small.weight_format, small.keys, small.rows = s.formats, s.weight_format, s.keys, rows
    small.counter, small.numbers = s.counter, s.numbers
    small.residual = None if s.residual is None else pick(s.residual)
    small.mask = None if s.mask is None else pick(s.mask).reshape(-1)
    return small


def _written(s: Segment) -> list[Tensor]:
    """What a step changes."""
    return [s.weight.detach(), *s.slots, *(t for t in (*s.scales, s.residual) if t is not None)]


def _plain(t: Tensor) -> Tensor:
    """The same memory in a dtype that torch can scatter: 8-bit floating point is none."""
    return t.view(torch.uint8) if t.is_floating_point() and t.itemsize == 1 else t
