"""From live param_groups to segments: what a step works on, checked at every step.

Nothing is cached by promise. Frameworks move gradients, swap parameters, load state and replace tensors between
steps; `Plan.refresh` compares everything a plan was built from with what is there now, at C speed, and a plan that
no longer holds is built anew. Gradient addresses are the one thing that may change freely.
"""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt_kernels import table

from . import layout, shards, streams
from .average import init_ema, is_averaged
from .formats import REAL, rounds_at_random, weight_format
from .groups import GroupOptions
from .guard import guard_of
from .masters import Watch
from .pieces import check_pieces
from .segment import Segment, in_order
from .state import drop_counters
from .streams import key_of
from .support import check_distinct, check_supported

if TYPE_CHECKING:
    from .stepper import Stepper

_grad = attrgetter("grad")
_local = attrgetter("_local_tensor")
_spec = attrgetter("_spec")
_placed = attrgetter("mesh", "placements")
_address = torch._C.TensorBase.data_ptr
_params = itemgetter("params")


class Plan:
    """The segments of one step over all parameters that have a gradient."""

    def __init__(self, optimizer: "Stepper") -> None:
        groups = optimizer.param_groups
        streams.assign(optimizer)
        self.groups = [GroupOptions(optimizer.rule_of(group), group) for group in groups]
        self.lists = [list(group["params"]) for group in groups]
        check_pieces(optimizer, self.groups, self.lists)
        self.segments: list[Segment] = []
        self.sparse: list[Segment] = []
        self.idle: list[Segment] = []
        self.without_grad: list[Tensor] = []
        for index, params in enumerate(self.lists):
            for place, p in enumerate(params):
                if p.grad is None:
                    self.without_grad.append(p)
                    if self.groups[index].averaged and is_averaged(p):
                        check_supported(optimizer, p, self.groups[index])
                        self.idle.append(Segment(p, index, len(self.idle)))
                else:
                    check_supported(optimizer, p, self.groups[index])
                    members = self.segments if p.grad.layout == torch.strided else self.sparse
                    members.append(Segment(p, index, len(members), in_order(p, self.groups[index])))
                    members[-1].keys = _keys(p, self.groups[index], place)
        self._check_complex()
        for segment in (*self.segments, *self.sparse):
            optimizer._init_state(segment, self.groups[segment.group])
        for segment in (*self.segments, *self.sparse, *self.idle):
            if self.groups[segment.group].averaged:
                init_ema(optimizer, segment)
        drop_counters(optimizer)
        self.masters = Watch(optimizer, (*self.segments, *self.sparse, *self.idle))
        self.params = [s.param for s in self.segments]
        self.updated = [*self.params, *(s.param for s in self.sparse)]
        self.resting = [s.param for s in self.idle]
        self.placed = [*self.updated, *self.resting]
        self.spread = [i for i, p in enumerate(self.placed) if shards.is_dtensor(p)]
        placed = self._here(self.placed)
        check_distinct(placed[: len(self.updated)], list(map(_address, placed[: len(self.updated)])))
        self.addresses = list(map(_address, placed))
        self.states = _state_values(optimizer)
        # `state.data = …` keeps the object; who moves state so moves all of it, and an address costs 0.2 µs cold
        moved = [s.slots[0] if s.slots else s.ema for s in (*self.segments, *self.sparse, *self.idle)]
        self.state_tensors = [t for t in moved if t is not None]
        self.state_addresses = list(map(_address, self.state_tensors))
        self._watch_gradients()

    def _check_complex(self) -> None:
        kinds = {group.norm_kind for group in self.groups if group.wants_norm}
        if kinds - {table.NORM_TWO.value} and any(s.param.is_complex() for s in (*self.segments, *self.sparse)):
            raise ValueError(
                "clip_norm_type=1.0 or inf is not defined for complex parameters, whose real and imaginary parts are "
                "summed up apart: use 2.0, or fusedopt.clip_grad_norm_ before the step"
            )

    def _here(self, tensors: list[Any]) -> list[Any]:
        """The same, local ones in place of DTensors."""
        if not self.spread:
            return tensors
        if len(self.spread) == len(tensors):
            return list(map(_local, tensors))
        local = list(tensors)
        for i in self.spread:
            local[i] = _local(tensors[i])
        return local

    def _gradients(self, grads: list[Any]) -> list[Any]:
        """What of each gradient lies here; DTensors are placed as their parameters."""
        if not self.spread:
            return grads
        if not self.moved and len(self.spread) == len(self.placed) == len(grads):
            local = list(map(_local, grads))
            if set(map(type, local)) == {Tensor}:  # no collective is under way
                return local
        local = list(grads)
        for i in self.spread:
            if i < len(local):
                t = _local(grads[i])
                as_it_is = i not in self.moved and type(t) is Tensor
                local[i] = t if as_it_is else shards.gradient(self.params[i], grads[i])
        return local

    def _same_places(self, grads: list[Any]) -> bool:
        """Whether DTensor gradients are placed as they were; `fully_shard` gives them the very same specification."""
        all_of = len(self.specs) == len(grads)
        specs = list(map(_spec, grads)) if all_of else [_spec(grads[i]) for i in self.spread if i < len(grads)]
        return all(map(is_, specs, self.specs)) or list(map(_placed, specs)) == list(map(_placed, self.specs))

    def _watch_gradients(self) -> None:
        whole: list[Any] = [s.param.grad for s in self.segments]
        few = [i for i in self.spread if i < len(whole)]
        self.specs = [_spec(whole[i]) for i in few]
        self.moved = {i for i in few if whole[i].placements != self.params[i].placements}  # pyright: ignore[reportAttributeAccessIssue] # a DTensor's
        grads = self._gradients(whole)
        weights = self._here(self.placed)
        self.guard = guard_of([*weights[: len(grads)], *weights[len(self.updated) :], *grads])
        for segment, grad in zip(self.segments, grads, strict=True):
            if not layout.same_layout(grad, segment.weight):
                segment.grad_buffer = _grad_buffer(segment, grad)
        self.relaid = [s for s in self.segments if s.grad_buffer is not None]
        self.resolvable = [s for s, g in zip(self.segments, grads, strict=True) if layout.needs_resolving(g)]
        self.packed = [s for s in self.segments if s.weight is not s.local]
        self.set_gradients(grads)

    def set_gradients(self, grads: list[Tensor]) -> None:
        """Take this step's gradients; those of another layout (or lazily conjugated) are copied."""
        self.grads = grads
        for segment in self.relaid:
            assert segment.grad_buffer is not None
            segment.grad_buffer.copy_(grads[segment.position])
            grads[segment.position] = segment.grad_buffer
        for segment in self.resolvable:
            if layout.needs_resolving(grads[segment.position]):  # not so once copied above
                grads[segment.position] = _like(grads[segment.position], segment.weight)
        self.grad_addresses = list(map(_address, grads))

    def replace_gradients(self, grads: Sequence[Tensor]) -> None:
        """Take other tensors for this step's gradients, in any layout."""
        pairs = zip(grads, self.segments, strict=True)
        self.set_gradients(
            [g if s.grad_buffer is not None or _fits(g, s.weight) else _like(g, s.weight) for g, s in pairs]
        )

    def refresh(self, optimizer: "Stepper") -> bool:
        """True if the plan still describes the optimizer; then this step's gradients have been taken."""
        groups = optimizer.param_groups
        if len(groups) != len(self.lists):
            return False
        for params, known in zip(map(_params, groups), self.lists, strict=True):
            if len(params) != len(known) or not all(map(is_, params, known)):
                return False
        if any(g is not None for g in map(_grad, self.without_grad)):
            return False
        grads = list(map(_grad, self.params))
        placed = self.placed
        try:
            if self.spread:
                if not self._same_places(grads):
                    return False
                placed, grads = self._here(placed), self._gradients(grads)
            if not self.guard.check(*placed[: len(grads)], *placed[len(self.updated) :], *grads):
                return False
        except (AttributeError, TypeError):  # a gradient went away
            return False
        if list(map(_address, placed)) != self.addresses:
            return False
        if not all(_still_sparse(s) for s in self.sparse):
            return False
        states = _state_values(optimizer)
        if len(states) != len(self.states) or not all(map(is_, states, self.states)):
            return False
        if list(map(_address, self.state_tensors)) != self.state_addresses:
            return False
        self.masters.renew()
        self.set_gradients(grads)
        return True

    def changed_groups(self, optimizer: "Stepper") -> list[int] | None:
        """Indices of groups whose numbers changed; None if a change needs another plan."""
        changed: dict[int, GroupOptions] = {}
        for index, group in enumerate(optimizer.param_groups):
            if not self.groups[index].unchanged(group):
                changed[index] = GroupOptions(optimizer.rule_of(group), group)
                if not changed[index].same_structure(self.groups[index]):
                    return None
        for index, new in changed.items():  # all or none: one that is refused must not hide the others
            self.groups[index] = new
        return list(changed)

    def pack(self) -> None:
        """Copy parameters with gaps into their dense buffers."""
        for segment in (*self.packed, *(s for s in self.idle if s.weight is not s.local)):
            segment.weight.copy_(segment.local.detach())

    def unpack(self) -> None:
        """Copy the buffers back and tell autograd that every parameter changed."""
        for segment in self.packed:
            segment.local.detach().copy_(segment.weight)
        torch.autograd.graph.increment_version(self.updated)
        self.masters.see()


def _still_sparse(s: Segment) -> bool:
    """The gradient is one that the plan was checked with (`check_supported`)."""
    grad = s.param.grad
    return grad is not None and grad.layout == torch.sparse_coo and (grad.sparse_dim() == 1 or not any(s.formats))


def _keys(p: Tensor, options: GroupOptions, place: int) -> tuple[int | None, ...]:
    """Keys of the streams that round the weight and each slot of a group's parameter number ``place``."""
    chosen = options.options
    weight = key_of(chosen, place, "weight") if rounds_at_random(weight_format(p, chosen), chosen) else None
    state = chosen.get("state_rounding") == "stochastic" and p.dtype in REAL
    return (weight, *(key_of(chosen, place, f"state.{slot.name}") if state else None for slot in options.slots))


def _state_values(optimizer: "Stepper") -> list[Any]:
    """Everything in the optimizer's state, in order."""
    try:
        return list(chain.from_iterable(map(dict.values, optimizer.state.values())))
    except TypeError:  # an entry of the user's that is no dict
        return [v for s in optimizer.state.values() for v in (s.values() if isinstance(s, dict) else (s,))]


def _fits(grad: Tensor, weight: Tensor) -> bool:
    """Whether the gradient's memory can be walked as it is."""
    return layout.same_layout(grad, weight) and not layout.needs_resolving(grad)


def _like(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient's values in the parameter's layout."""
    return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


def _grad_buffer(segment: Segment, grad: Tensor) -> Tensor:
    if segment.weight is segment.local:
        layout.warn_once(
            "relaid",
            f"a gradient with strides {grad.stride()} is copied at every step into its parameter's layout "
            f"{segment.weight.stride()}; give both the same memory format to save the copy",
        )
    return torch.empty_like(segment.weight, dtype=grad.dtype)
