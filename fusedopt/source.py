"""Norm at the source (option ``norm_at_backward``): gradients are summed up when backward has produced them.

A hook on every parameter launches the norm pass over its gradient alone, into the place that this gradient has among
the norm pass's partials; so the step needs no norm pass, and has the norm that it would have had. What no hook saw is
summed up in the step, and a gradient that changed after its hook is refused. ``docs/norm_at_backward.md`` has the rest.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fusedopt_kernels import table

from . import flatten, layout
from .groups import GroupOptions
from .hooks import hook_of, remove_with
from .metrics import Metrics
from .plan import Plan, _fits
from .source_sums import EagerSums, KernelSums, sums_of
from .upload import capturing

if TYPE_CHECKING:
    from .parts import Parts


class Seen(NamedTuple):
    """A gradient as its hook found it."""

    grad: weakref.ref[Tensor]
    address: int
    version: int

    @classmethod
    def of(cls, grad: Tensor) -> "Seen":
        return cls(weakref.ref(grad), grad.data_ptr(), grad._version)

    def is_still(self, grad: Tensor | None) -> bool:
        """Whether that gradient has not been replaced, moved or, as far as torch knows, written to."""
        return grad is not None and self.grad() is grad and (grad.data_ptr(), grad._version) == self[1:]


class Place(NamedTuple):
    """Where a parameter's gradient is summed up, and what it must look like."""

    sums: KernelSums | EagerSums
    index: int
    weight: Tensor
    dtype: torch.dtype


class Source:
    """The hooks of one optimizer, and what they have seen since its last step."""

    def __init__(self, checks: bool) -> None:
        """checks: make the norm pass all the same and compare."""
        self.checks = checks
        self._pauses = 0
        self._plan: Plan | None = None
        self._sums: list[KernelSums | EagerSums] = []
        self._places: dict[Tensor, Place] = {}
        self._seen: dict[Tensor, Seen] = {}
        self._accumulated: Tensor | None = None
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._hook = hook_of(self)
        remove_with(self, self._handles)

    # ------------------------------------------------------------------------------------------------- backward
    def fire(self, p: Tensor) -> None:
        """Sum up a gradient that backward has just produced."""
        place, before = self._places.get(p), self._seen.get(p)
        if before is not None and before.grad() is not p.grad:
            del self._seen[p]
        if place is None or self._pauses or torch.compiler.is_compiling() or capturing():
            return
        if flatten.has_gradients and (home := flatten._home(p)) is not None:
            home(p)  # its own hook may come after this one
        if p in self._seen:  # an optimizer that is not stepped any more must not stop another one's backward
            self._accumulated = p
            return
        grad = p.grad
        if grad is not None and _is_as_planned(grad, place):
            place.sums.add(place.index, grad.detach())
            self._seen[p] = Seen.of(grad)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hooks do nothing inside."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    # ----------------------------------------------------------------------------------------------------- step
    def take(self, plan: Plan, parts: "Parts", given: dict[int, Any]) -> None:
        """Have all sums ready for a step, those that hooks made and the rest; or leave them to the norm pass.

        Raises:
            RuntimeError: a gradient changed or was accumulated into since its hook; several processes; a stock
                GradScaler.
            ValueError: no norm is used.
        """
        refuse_distributed()
        if table.FOUND_INF.value in given:
            raise RuntimeError(
                "norm_at_backward: torch.amp.GradScaler and unscale_ rewrite gradients after their norms have been "
                "taken: step with fusedopt.GradScaler and without unscale_, or leave norm_at_backward out"
            )
        if plan is not self._plan:  # its tables are new
            check_used(plan.groups, parts.shared.metrics)
            if self._handles:
                layout.warn_once(
                    "norm of a new plan",
                    "norm_at_backward: this step takes the norm by itself, as the first one did, because parameters, "
                    "state, options or which gradients there are changed since the last",
                )
            return
        if (p := self._accumulated) is not None:
            raise RuntimeError(
                f"norm_at_backward: the gradient of a parameter of shape {tuple(p.shape)} was accumulated into after "
                "its norm had been taken: run every backward pass but the last before a step inside `with "
                "optimizer.accumulate():`, or call optimizer.zero_grad() if there was to be no step"
            )
        unseen = {id(sums): self._unseen(sums) for sums in self._sums}
        for sums in self._sums:
            part, few = sums.part, unseen[id(sums)]
            part.summed = len(few) < len(part.segments)
            if few:
                layout.warn_once(
                    "norm not at backward",
                    f"norm_at_backward: {len(few)} of {len(part.segments)} gradients were not seen by their hooks "
                    "(set by hand, left from an earlier pass, or in another layout than their parameter) and are "
                    "summed up in the step",
                )
            for index in few if part.summed else ():
                sums.add(index, plan.grads[part.segments[index].position])
            if self.checks and part.summed and (wrong := sums.wrong(plan)):
                p = part.segments[wrong[0]].param
                self.forget()
                raise RuntimeError(
                    f"norm_at_backward='check': {len(wrong)} gradients were rewritten after their hooks in a way that "
                    f"torch does not see, the first that of a parameter of shape {tuple(p.shape)}: leave "
                    "norm_at_backward out"
                )

    def _unseen(self, sums: KernelSums | EagerSums) -> list[int]:
        """Segments whose gradients no hook has summed up; the others are as they were then."""
        unseen = []
        for index, s in enumerate(sums.part.segments):
            seen = self._seen.get(s.param)
            if seen is None:
                unseen.append(index)
            elif not seen.is_still(s.param.grad):
                raise RuntimeError(
                    f"norm_at_backward: the gradient of a parameter of shape {tuple(s.param.shape)} "
                    f"(param_groups[{s.group}]) was replaced, moved or written to after its norm had been taken: "
                    "leave gradients alone between backward and step (clipping and unscaling are the step's), "
                    "accumulate inside `with optimizer.accumulate():`, or leave norm_at_backward out"
                )
        return unseen

    def attach(self, plan: Plan, parts: "Parts") -> None:
        """After a step: forget its gradients, and hook the parameters of a new plan."""
        self.forget()
        if plan is self._plan:
            return
        self._plan, self._sums = plan, sums_of(plan, parts)
        self._places = {
            s.param: Place(sums, index, s.weight, s.grad_dtype)
            for sums in self._sums
            for index, s in enumerate(sums.part.segments)
        }
        for p in self._handles.keys() - self._places.keys():
            self._handles.pop(p).remove()
        for p in self._places.keys() - self._handles.keys():
            if p.requires_grad and p.is_leaf:
                self._handles[p] = p.register_post_accumulate_grad_hook(self._hook)

    def forget(self) -> None:
        """Gradients were dropped."""
        self._seen.clear()
        self._accumulated = None

    def leave(self) -> None:
        """The plan is gone; hooks do nothing until the next."""
        self._plan, self._sums = None, []
        self._places.clear()
        self.forget()


def _is_as_planned(grad: Tensor, place: Place) -> bool:
    """The gradient can be summed up where it is; another one needs a copy, or another plan."""
    return grad.layout == torch.strided and grad.dtype == place.dtype and _fits(grad, place.weight)


# --------------------------------------------------------------------------------------------------------- refusals
def checked(value: Any, amp_scaling: bool) -> bool | str:
    """The option's value.

    Raises:
        ValueError: another value, or with ``amp_scaling``. RuntimeError: several processes train together.
    """
    if not isinstance(value, bool) and value != "check":
        raise ValueError(f"norm_at_backward must be True, False or 'check', got {value!r}")
    if value and amp_scaling:
        raise ValueError(
            "norm_at_backward does not work with amp_scaling=True, under which torch.amp.GradScaler rewrites gradients "
            "after backward: leave amp_scaling out and use fusedopt.GradScaler"
        )
    if value:
        refuse_distributed()
    return value


def check_used(groups: Sequence[GroupOptions], metrics: Metrics) -> None:
    """Refuse to take norms for nothing.

    Raises:
        ValueError: no option uses them.
    """
    if not (metrics.norm or any(group.wants_norm or group.rule.grad_norm for group in groups)):
        raise ValueError(
            "norm_at_backward needs something that uses the norm: clip_grad_norm, skip_nonfinite (also under "
            "fusedopt.GradScaler), skip_norm_above, or metrics=['grad_norm']"
        )


def refuse_distributed() -> None:
    """Refuse where gradients are reduced after their hooks, which neither addresses nor versions show.

    Raises:
        RuntimeError: torch.distributed has a process group.
    """
    if dist.is_available() and dist.is_initialized():
        raise RuntimeError(
            "norm_at_backward does not work in a torch.distributed process group: DistributedDataParallel and "
            "FullyShardedDataParallel reduce gradients after their norms would have been taken; leave it out"
        )
