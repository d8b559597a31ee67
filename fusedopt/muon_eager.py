"""The step of Muon with eager twins; see ``muon_step.py``."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fusedopt_kernels.numerics import compute_type

from .blocks import Lane, as_tensor
from .conditions import Conditions
from .eager import EagerStep
from .groups import GroupOptions
from .metrics import Metrics, Report
from .muon_step import Directions
from .norm import Sums
from .ports import Port
from .rule import Rule
from .segment import Segment


class MuonEager:
    """The step with eager twins; see the module's text."""

    def __init__(
        self, rules: tuple[Rule, Rule], rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions],
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self.work = Directions(rules, segments, groups)
        self.momentum = EagerStep(rules[0], self.work.first, self.work.before.list, Metrics(()))
        for ports, s, view in zip(self.momentum.ports, segments, self.work.views, strict=True):
            ports[0] = _ScratchPort(view, compute_type(s.weight.dtype))
        self.apply = EagerStep(rules[1], self.work.second, self.work.after.list, metrics)

    def set_hypers(self, indices: Sequence[int]) -> None:
        """Take the current hyper-parameters of some groups."""
        self.work.renew(indices)

    def report(self) -> Report:
        """What the last step measured."""
        return self.momentum.report()._replace(change=self.apply.report().change)

    @property
    def skipped(self) -> bool:
        """Whether the last step was."""
        return self.momentum.skipped

    @property
    def found(self) -> Tensor:
        """Whether a gradient of the last step held inf or NaN."""
        return self.momentum.found

    @property
    def tally(self) -> Tensor | None:
        """Running counts."""
        return self.momentum.tally

    @tally.setter
    def tally(self, counts: Tensor) -> None:
        self.momentum.tally = counts

    def totals(self, grads: list[Tensor], kind: int) -> Sums:
        """Sums over the gradients, see `EagerStep.totals`."""
        return self.momentum.totals(grads, kind)

    def run(self, grads: list[Tensor], conditions: Conditions) -> None:
        """One step over all segments; ``grads`` are those of the whole plan, by segment position."""
        self.momentum.run(grads, conditions)
        if not self.momentum.skipped:
            self.work.orthogonalise()
            self.apply.run(self.work.views, Conditions(()))
        else:
            self.apply.measure_unchanged()


class _ScratchPort(Port):
    """Eager twin of ``param/scratch.py``: reads zeros, keeps the new value rounded to bf16."""

    def load(self, low: int, high: int, lane: Lane) -> Any:
        array = lane.take(self.compute, high - low)
        as_tensor(array).zero_()
        return array
