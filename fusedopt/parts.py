"""The parts of a step: segments of one device, rule and kind of gradient, each with its own tables or eager twins."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import launch, numerics, table

from .average_step import AverageTables, EagerAverages
from .conditions import Conditions
from .derived import without_average
from .eager import EagerStep
from .numbers import Shared
from .offload import OffloadTables, warn_on_host
from .rule import Rule
from .segment import Segment
from .shard_step import ShardEager, ShardTables
from .sparse import EagerRows, SparseTables
from .tables import DeviceTables
from .upload import capturing, reserve

if TYPE_CHECKING:
    from .plan import Plan


HOST = torch.device("cpu")
"""Where eager twins read the numbers of a step, wherever their parameters are."""


class Parts:
    """All parts of a plan. tables: those that run kernels; eager: those that run twins; averages: what comes after."""

    def __init__(self, plan: "Plan", backend: str, shared: Shared) -> None:
        self.groups, self.shared, self.backend = plan.groups, shared, backend
        self.tables: list[Any] = []
        self.eager: list[Any] = []
        self.averages: list[Any] = []
        self._given: Any = None
        self._found: Tensor | None = None  # whether a scaler on any rank found inf, at an address that stays
        self._reserved = False  # pinned memory for a capture of this step
        self._conditions = Conditions(())
        self._make(plan)
        for tables in (*self.tables, *self.averages):
            tables.set_hypers(range(len(plan.groups)))
        for tables in self.tables:
            tables.set_conditions(self._conditions_of({}))
        if self.tables:
            self.tables[0].count_steps(shared.tally(self.tables[0].device))
        elif self.eager:
            self.eager[0].tally = shared.tally(HOST)

    def _make(self, plan: "Plan") -> None:
        members: dict[tuple[torch.device, Rule, bool], list[Segment]] = {}
        apart: dict[torch.device, list[Segment]] = {}
        for segments, is_sparse in ((plan.segments, False), (plan.sparse, True)):
            for s in segments:
                members.setdefault((s.weight.device, plan.groups[s.group].rule, is_sparse), []).append(s)
        for (device, rule, is_sparse), own in members.items():
            kernels = runs_kernels(device, self.backend, self.shared.launcher)
            if self.shared.reach.shared_out and (is_sparse or rule.kernel_part is not None):
                what = "sparse gradients" if is_sparse else rule.name
                raise NotImplementedError(f"{what} beside DTensor parameters: give each an optimizer of its own")
            ordinary = not is_sparse and rule.kernel_part is None
            if not (ordinary and kernels) and (averaged := [s for s in own if s.ema is not None]):
                apart.setdefault(device, []).extend(averaged)
                own = [without_average(s) for s in own]
            self.shared.metrics.check(rule, is_sparse)
            if kernels:
                kind = SparseTables if is_sparse else rule.kernel_part or self._dense
                made = kind(rule, own, plan.groups, self.shared)
            else:
                if self.shared.offload is not None:
                    warn_on_host()
                step = EagerRows if is_sparse else rule.eager_part or self._dense_eager
                made = step(rule, own, plan.groups, self.shared.metrics)
            (self.tables if kernels else self.eager).extend(made if isinstance(made, list) else [made])
        for s in plan.idle:
            apart.setdefault(s.weight.device, []).append(s)
        for device, own in apart.items():
            if runs_kernels(device, self.backend, self.shared.launcher):
                self.averages.append(AverageTables(own, plan.groups, self.shared))
            else:
                self.averages.append(EagerAverages(own, plan.groups))

    @property
    def _dense(self) -> Any:
        """What runs the kernels of an element-wise rule."""
        if self.shared.reach.shared_out:
            return ShardTables
        return OffloadTables if self.shared.offload else DeviceTables

    @property
    def _dense_eager(self) -> Any:
        """What runs its twins."""
        return partial(ShardEager, reach=self.shared.reach) if self.shared.reach.shared_out else EagerStep

    @property
    def _kernels(self) -> list[Any]:
        """Parts and averages that run kernels."""
        return [*self.tables, *(average for average in self.averages if isinstance(average, AverageTables))]

    def set_hypers(self, changed: Sequence[int]) -> None:
        """Take the current hyper-parameters of some groups."""
        self._given = None
        for part in (*self.tables, *self.eager, *self.averages):
            part.set_hypers(changed)

    def set_agreed(self) -> None:
        """Take what the groups agree on now."""
        for tables in self.tables:
            tables.set_agreed(self._conditions_of({}))

    def run(self, plan: "Plan", given: dict[int, Any]) -> None:
        """One step of all parts; given: the step's conditions, by column."""
        for tables in self.tables:
            tables.set_gradients(plan.grad_addresses)
        if self.shared.reach.joins and table.FOUND_INF.value in given:
            given = {**given, table.FOUND_INF.value: self._found_anywhere(given[table.FOUND_INF.value])}
        conditions = self._conditions_of(given)
        if self.shared.reach.shared_out:
            self._sum_by_tensor(plan, conditions)
        if conditions.norm_mode == table.SUMMED_NORM.value:
            self._sum_norms(plan, conditions)
        for tables in self.tables:
            tables.set_conditions(conditions.on(tables.device))
            tables.run()
        for part in self.eager:
            part.run(plan.grads, conditions.on(HOST))
        for average in self.averages:
            average.run(self._skipped(average.device, conditions))
        if not self._reserved:
            self.reserve()

    def reserve(self) -> None:
        """Keep pinned memory ready for a capture of this step."""
        if torch.cuda.is_initialized() and not capturing():
            reserve(sum(part.staging for part in self._kernels))
        self._reserved = True

    def prepare(self, given: dict[int, Any]) -> int:
        """Compile what a step under some conditions would launch; returns how many kernels were not ready."""
        conditions = self._conditions_of(given)
        summed = conditions.norm_mode == table.SUMMED_NORM.value
        for tables in self.tables:
            tables.set_conditions(conditions)
        ready = sum(tables.prepare_totals(conditions.kind) for tables in self.tables) if summed else 0
        return ready + sum(part.prepare() for part in self._kernels)

    def _conditions_of(self, given: dict[int, Any]) -> Conditions:
        """What this step as a whole depends on; kept while nothing of it changes.

        Raises:
            ValueError: a norm that nothing asks for.
        """
        key = [(column, (id(x), x.data_ptr()) if isinstance(x, Tensor) else x) for column, x in given.items()]
        on_host = any(isinstance(x, Tensor) and x.is_cpu for x in given.values())  # may have changed in place
        if key != self._given or on_host:
            metrics = self.shared.metrics
            conditions = Conditions(self.groups, given, self._is_joined, (metrics.norm, metrics.single))
            if table.TOTAL_NORM.value in given and not conditions.uses_total:
                raise ValueError(
                    "step(total_norm=…) needs clip_grad_norm with clip_scope='global', skip_nonfinite or "
                    "skip_norm_above"
                )
            self._given, self._conditions = key, conditions
        return self._conditions

    @property
    def _is_joined(self) -> bool:
        """Whether the norm of all gradients is put together from several sums."""
        reach, parts = self.shared.reach, (*self.tables, *self.eager)
        across = reach.shared_out and not all(part.by_tensor for part in parts)
        return across or reach.norm_group is not None or len(parts) > 1

    def _sum_by_tensor(self, plan: "Plan", conditions: Conditions) -> None:
        """Sums of single gradients over their ranks, in parts that need them."""
        for part in (part for part in (*self.tables, *self.eager) if part.by_tensor):
            use = conditions.use(part.rule, any(self.groups[s.group].clips_alone for s in part.segments))
            if use.mode != table.NO_NORM.value and (use.mode != table.GIVEN_NORM.value or use.own):
                with np.errstate(all="ignore"):
                    part.sum_by_tensor(plan.grads, use.kind)

    def _sum_norms(self, plan: "Plan", conditions: Conditions) -> None:
        """Sums of all parts' gradients, on all ranks, to every device that needs them."""
        kind, reach = conditions.kind, self.shared.reach
        sums = [tables.totals(kind) for tables in self.tables]
        for part in self.eager:
            own = part.totals(plan.grads, kind)
            sums.append(torch.tensor([own.total, own.bad], dtype=torch.float64, device=HOST))
        devices = list(dict.fromkeys([part.device for part in self.tables] + [HOST] * bool(self.eager or not sums)))
        if reach.joins:
            joined = [getattr(part, "by_tensor", False) for part in (*self.tables, *self.eager)]
            total = _together([x for x, done in zip(sums, joined, strict=True) if not done], devices[0], kind)
            if not all(joined):
                reach.join(total, kind)
            total = _together([total, *(x for x, done in zip(sums, joined, strict=True) if done)], devices[0], kind)
            reach.join_groups(total, kind)
            sums = [total]
        for device in devices:
            conditions.take_totals(device, _together(sums, device, kind))

    def _found_anywhere(self, found: Any) -> Tensor:
        """Whether a gradient on any rank is not finite, given whether one here is."""
        device = found.device if isinstance(found, Tensor) else HOST
        flag = torch.as_tensor(found, device=device).detach().reshape(1).double()
        self.shared.reach.join_flag(flag)
        if self._found is None or self._found.device != device:
            self._found = torch.zeros((), dtype=torch.float32, device=device)
        return self._found.copy_(flag[0])

    def _skipped(self, device: torch.device, conditions: Conditions) -> Tensor:
        """Whether the step was skipped: 1.0 or 0.0, one element on a device."""
        column = table.SKIPPED.value
        headers = sorted((part.header for part in self.tables), key=lambda header: header.device != device)
        if headers:
            return headers[0][column : column + 1].to(device)
        if self.eager:
            return torch.tensor([float(self.eager[0].skipped)], dtype=torch.float64, device=device)
        found = conditions.numbers[table.FOUND_INF.value] if conditions.scaled else 0.0
        return (torch.as_tensor(found, device=device).reshape(1) != 0).double()


def _together(sums: Sequence[Tensor], device: torch.device, kind: int) -> Tensor:
    """(sum of squares or as ``kind`` says, whether an element is not finite) of several parts."""
    if not sums:
        return torch.zeros(2, dtype=torch.float64, device=device)
    if len(sums) == 1:
        return sums[0].to(device)
    all_of = torch.stack([x.to(device) for x in sums])
    return all_of.amax(0) if kind == table.NORM_INF.value else all_of.sum(0)


def runs_kernels(device: torch.device, backend: str, launcher: launch.Launcher) -> bool:
    """Whether tensors on a device take kernels or twins.

    Raises:
        RuntimeError: the backend cannot run there.
    """
    if device.type == "cpu" and backend == "triton" and not launcher.accepts_cpu:
        raise RuntimeError(
            "backend='triton' on CPU tensors needs the interpreter: set TRITON_INTERPRET=1 in the environment "
            "before Python starts, move the parameters to a GPU, or use backend='eager'"
        )
    kernels = backend == "triton" or (backend == "auto" and device.type == "cuda")
    if kernels and device.type == "cuda" and numerics.INTERPRETED:
        raise RuntimeError(
            "kernels run in the interpreter (TRITON_INTERPRET=1), which cannot read GPU memory: unset the variable "
            "before Python starts, move the parameters to the CPU, or use backend='eager'"
        )
    return kernels
