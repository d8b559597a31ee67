"""The parts of a step: segments of one device, rule and kind of gradient, each with its own tables or eager twins."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt_kernels import launch, numerics, table

from .conditions import Conditions
from .eager import EagerStep
from .plan import Segment
from .rule import Rule
from .sparse import EagerRows, SparseTables
from .tables import DeviceTables

if TYPE_CHECKING:
    from .plan import Plan


HOST = torch.device("cpu")
"""Where eager twins read the numbers of a step, wherever their parameters are."""


class Parts:
    """All parts of a plan. tables: those that run kernels; eager: those that run twins."""

    def __init__(self, plan: "Plan", backend: str, launcher: launch.Launcher) -> None:
        self.groups = plan.groups
        self.tables: list[Any] = []
        self.eager: list[Any] = []
        self._conditions: Conditions | None = None
        members: dict[tuple[torch.device, Rule, bool], list[Segment]] = {}
        for segments, is_sparse in ((plan.segments, False), (plan.sparse, True)):
            for s in segments:
                members.setdefault((s.weight.device, plan.groups[s.group].rule, is_sparse), []).append(s)
        for (device, rule, is_sparse), own in members.items():
            if _runs_kernels(device, backend, launcher):
                kind = SparseTables if is_sparse else rule.kernel_part or DeviceTables
                made = kind(rule, own, plan.groups, launcher)
                self.tables.extend(made if isinstance(made, list) else [made])
            else:
                step = EagerRows if is_sparse else rule.eager_part or EagerStep
                made = step(rule, own, plan.groups)
                self.eager.extend(made if isinstance(made, list) else [made])
        for tables in self.tables:
            tables.set_hypers(range(len(plan.groups)))

    def set_hypers(self, changed: Sequence[int]) -> None:
        """Take the current hyper-parameters of some groups."""
        self._conditions = None
        for part in (*self.tables, *self.eager):
            part.set_hypers(changed)

    def run(self, plan: "Plan", total_norm: float | Tensor | None) -> None:
        """One step of all parts."""
        for tables in self.tables:
            tables.set_gradients(plan.grad_addresses)
        conditions = self._conditions_of(total_norm)
        if conditions.norm_mode == table.SUMMED_NORM.value:
            self._sum_norms(plan, conditions)
        for tables in self.tables:
            tables.set_conditions(conditions.on(tables.device))
            tables.run()
        for part in self.eager:
            part.run(plan.grads, conditions.on(HOST))

    def _conditions_of(self, total_norm: float | Tensor | None) -> Conditions:
        """What this step as a whole depends on; kept, unless the caller gave a norm.

        Raises:
            ValueError: a norm that nothing asks for.
        """
        if total_norm is None and self._conditions is not None:
            return self._conditions
        given = {} if total_norm is None else {table.TOTAL_NORM.value: total_norm}
        conditions = Conditions(self.groups, len(self.tables) + len(self.eager) > 1, given)
        if given and not conditions.uses_total:
            raise ValueError(
                "step(total_norm=…) needs clip_grad_norm with clip_scope='global', skip_nonfinite or skip_norm_above"
            )
        if not given:
            self._conditions = conditions
        return conditions

    def _sum_norms(self, plan: "Plan", conditions: Conditions) -> None:
        """Sums of all parts' gradients, to every device that needs them."""
        sums = [tables.totals() for tables in self.tables]
        for part in self.eager:
            own = part.totals(plan.grads)
            sums.append(torch.tensor([own.square, own.bad], dtype=torch.float64))
        devices = {part.device for part in self.tables} | ({HOST} if self.eager else set())
        for device in devices:
            conditions.take_totals(device, torch.stack([x.to(device) for x in sums]).sum(0))


def _runs_kernels(device: torch.device, backend: str, launcher: launch.Launcher) -> bool:
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
