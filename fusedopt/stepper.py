"""How a step runs: the plan it keeps while nothing changes, and the parts that carry it out."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt_kernels import launch, table

from . import buffers, flatten
from .arguments import check_given
from .captures import capture
from .groups import GroupOptions
from .metrics import Metrics
from .numbers import Shared
from .offload import Offload
from .parts import Parts
from .plan import Plan
from .ranks import NormGroup, Reach
from .rule import Rule
from .segment import Segment
from .shards import is_dtensor
from .source import Source
from .state import init_state
from .upload import capturing

_LAUNCHER = launch.Launcher()


class Stepper(torch.optim.Optimizer):
    """The inner half of `FusedOptimizer`: everything between ``step()`` and the kernels."""

    rule: ClassVar[Rule]
    backend: str = "auto"
    _plan: Plan | None = None
    _parts: Parts
    _reported: Parts | None = None  # of the last step, for metrics
    _launcher: launch.Launcher = _LAUNCHER
    _metrics = Metrics(())
    _check_nonfinite = False  # set by GradScaler around a step
    _swapped = False  # inside swap_ema
    _norm_at_backward: bool | str = False
    _source: Source | None = None
    _offload_state = False
    _release_gradients = False
    _norm_group: NormGroup | None = None
    _stand_ins: Mapping[Tensor, Tensor] = MappingProxyType({})  # parameters whose places others take, see `warmup`
    _release: Any = None  # a `Release`, which needs this class
    _counters: dict[Tensor, Tensor]

    def _begin(self) -> None:
        """No plan, no captured steps, no counts."""
        self._shared = Shared(self._launcher, self._metrics)
        self._shared.offload = Offload() if self._offload_state else None
        self._captures: list[tuple[Plan, Parts]] = []
        self._source = Source(self._norm_at_backward == "check") if self._norm_at_backward else None
        self._forget_plan()

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """The rule that updates a group's parameters."""
        return self.rule

    def defaults_of(self, group: dict[str, Any]) -> dict[str, Any]:
        """Group keys of that rule, with their defaults."""
        return self.defaults

    def _init_state(self, segment: Segment, options: GroupOptions) -> None:
        """Make or take over what a segment needs of its parameter's state."""
        if self._shared.offload is None:
            init_state(self, segment, options)
        else:
            self._shared.offload.init_state(self, segment, options)

    @property
    def _tables(self) -> list[Any]:
        """Parts of the present plan that run kernels."""
        return [] if self._plan is None else self._parts.tables

    @property
    def _eager(self) -> list[Any]:
        """Parts of the present plan that run twins."""
        return [] if self._plan is None else self._parts.eager

    def _step(self, grads: list[Tensor] | None = None, total_norm: float | Tensor | None = None) -> None:
        """One step; ``grads`` stand in for the gradients of the parameters that have one, in their order."""
        given = self._given(total_norm)
        if self._release is not None:
            self._release.step(given)
            return
        if capturing():
            capture(self, grads, given)
            return
        plan, changed = self._plan, None
        if plan is not None and plan.refresh(self):
            changed = plan.changed_groups(self)
        if plan is None or changed is None:
            plan = self._build()
        elif changed:
            self._parts.set_hypers(changed)
        self._run(plan, grads, given)

    def _run(self, plan: Plan, grads: list[Tensor] | None, given: dict[int, Any]) -> None:
        try:
            if grads is not None:
                plan.replace_gradients(grads)
            plan.pack()
            if self._source is not None:
                self._source.take(plan, self._parts, given)
            self._parts.run(plan, given)
            if self._source is not None:
                self._source.attach(plan, self._parts)
            self._reported = self._parts
            plan.unpack()
        finally:
            plan.grads = []  # else they would live until the next step, beside those of the next backward pass

    def _given(self, total_norm: float | Tensor | None) -> dict[int, Any]:
        """Conditions of this step, by column: the norm, and what torch.amp.GradScaler or the user set."""
        given = {
            table.TOTAL_NORM.value: total_norm,
            table.GRAD_SCALE.value: getattr(self, "grad_scale", None),
            table.FOUND_INF.value: getattr(self, "found_inf", None),
            table.CHECK.value: 1.0 if self._check_nonfinite else None,
        }
        names = ("total_norm", "grad_scale", "found_inf")
        for name, value in zip(names, given.values(), strict=False):
            check_given(name, value)
        kept = {column: _whole(value) for column, value in given.items() if value is not None}
        return {column: x.detach() if isinstance(x, Tensor) and x.requires_grad else x for column, x in kept.items()}

    def _found_inf(self) -> list[Tensor]:
        """Whether a gradient of the last step held inf or NaN: 1.0 or 0.0, 0-dim fp32; empty without gradients."""
        parts = self._reported
        if parts is None:
            return []
        found = [part.header.view(torch.float32)[2 * table.FOUND.value] for part in parts.tables]
        return [*found, *(part.found for part in parts.eager)][:1]

    def _forget_plan(self) -> None:
        """Drop the plan and everything it holds: state, packed parameters, device tables."""
        self._plan = self._reported = None
        self.__dict__.pop("_parts", None)
        for hooks in (self._source, self._release):
            if hooks is not None:
                hooks.leave()
        self._written: list[Tensor] = []

    def _build(self) -> Plan:
        """A new plan from what is there now, and its parts by device."""
        self._forget_plan()
        plan = Plan(self)
        for s in plan.segments if self._stand_ins else ():
            s.place_as(self._stand_ins[s.param])
        self._shared.launcher, self._shared.metrics = self._launcher, self._metrics
        self._shared.reach = Reach((*plan.segments, *plan.sparse), self._norm_group)
        self._parts = Parts(plan, self.backend, self._shared)
        self._plan = plan
        if any(map(buffers.is_placed, plan.params)):
            self._written = flatten.bases(plan.params)
        return plan


def _whole(number: Any) -> Any:
    """A number that may be spread over ranks, as torch's norms of DTensors are."""
    return number.full_tensor() if is_dtensor(number) else number
