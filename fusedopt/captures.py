"""Steps that go into a CUDA graph, and how their hyper-parameters stay live."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt_kernels import table

from .average_step import EagerAverages

if TYPE_CHECKING:
    from .parts import Parts
    from .plan import Plan
    from .stepper import Stepper


def capture(optimizer: "Stepper", grads: list[Tensor] | None, given: dict[int, Any]) -> None:
    """A step that goes into a CUDA graph, with tables of its own that live as long as the optimizer.

    A replay reads the addresses that were captured, whatever later steps upload or rebuild; hyper-parameters it reads
    from tables that all steps share.

    Raises:
        RuntimeError: something that a replay would not see change, or cannot do; says what to do instead.
    """
    if optimizer._source is not None:
        raise RuntimeError(
            "norm_at_backward does not work inside a CUDA graph, whose replays would not check what became of the "
            "gradients after their hooks: leave the option out of an optimizer whose step is captured"
        )
    if optimizer._offload_state:
        raise RuntimeError("offload_state=True does not work inside a CUDA graph: leave it out of a captured optimizer")
    try:
        plan = optimizer._build()
        parts = optimizer._parts
        _check(plan, parts, given)
        optimizer._captures.append((plan, parts))
        optimizer._run(plan, grads, given)
    finally:
        optimizer._forget_plan()
    optimizer._reported = parts


def _check(plan: "Plan", parts: "Parts", given: dict[int, Any]) -> None:
    if parts.eager or any(isinstance(part, EagerAverages) for part in parts.averages):
        raise RuntimeError("only Triton kernels can be captured in a CUDA graph: eager twins read from the device")
    if plan.sparse:
        raise RuntimeError(
            "a sparse gradient cannot be captured in a CUDA graph: how many rows it touches is read back from the "
            "device; make the embedding's gradients dense (sparse=False)"
        )
    if any(group.on_host for group in plan.groups):
        raise RuntimeError(
            "a hyper-parameter is a CPU tensor, whose changes a captured CUDA graph would not see; "
            "make it a tensor on the GPU, or a float, which refresh() renews"
        )
    for column, value in given.items():
        live = isinstance(value, Tensor) and all(part.device.type == value.device.type for part in parts.tables)
        if column != table.CHECK.value and not live:
            raise RuntimeError(
                "a CUDA graph would keep the present value of total_norm, grad_scale or found_inf: give it as a tensor "
                "on the GPU"
            )


def refresh(optimizer: "Stepper") -> None:
    """See `FusedOptimizer.refresh`."""
    for plan, parts in optimizer._captures:
        same = len(plan.groups) == len(optimizer.param_groups)
        if not same or (changed := plan.changed_groups(optimizer)) is None:
            if parts is not optimizer._captures[-1][1]:
                continue  # captured again since
            raise RuntimeError(
                "an option changed that a captured step cannot follow (a flag, a group, an option switched on or off): "
                "capture the step again"
            )
        if changed:
            parts.set_hypers(changed)
            parts.set_agreed()
    if optimizer._plan is None and not optimizer._captures:
        with torch.no_grad():
            optimizer._build()
    plan = optimizer._plan
    if plan is not None and (changed := plan.changed_groups(optimizer)):
        optimizer._parts.set_hypers(changed)
        optimizer._parts.set_agreed()
    if optimizer._captures:  # another capture may follow, and takes as much pinned memory
        optimizer._captures[-1][1].reserve()
