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
from fusedopt_kernels.param.format import WeightFormat
from fusedopt_kernels.state.format import StateFormat

from . import layout, streams
from .average import init_ema, is_averaged
from .formats import REAL, needs_order, rounds_at_random, weight_format
from .groups import GroupOptions
from .guard import guard_of
from .masters import Watch
from .state import drop_counters
from .streams import key_of
from .support import check_distinct, check_supported

if TYPE_CHECKING:
    from .stepper import Stepper

_grad = attrgetter("grad")
_address = torch._C.TensorBase.data_ptr
_params = itemgetter("params")


class Segment:
    """One parameter of the step: where its numbers are and how they are laid out.

    weight: the parameter, or its packed copy when it has gaps or, ``in_order``, is not contiguous. grad_buffer: where
    a gradient of another layout is copied to, or None. slots: state tensors in the rule's order, codes where a slot is
    quantised; scales, formats: what belongs to those, else None. weight_format: None for a plain weight; residual: what
    it keeps beside the weight. keys: of the random streams that round the weight and each slot, None where nothing
    does. rows: numbers of the parameter's rows that these are, None for all. numbers: its scalar slots, 0-dim. counter:
    0-dim step count, or None; counted: another part of the step counts in it. mask: a byte per stored number, 0 where
    it may not change; or None. ema, ema_step: running average of the weight and its 0-dim count of steps, or None.
    """

    __slots__ = (
        "counted", "counter", "ema", "ema_step", "formats", "grad_buffer", "group", "keys", "mask", "numbers", "param",
        "position", "residual", "rows", "scales", "slots", "weight", "weight_format",
    )  # fmt: skip

    def __init__(self, param: Tensor, group: int, position: int, in_order: bool = False) -> None:
        self.param, self.group, self.position = param, group, position
        fits = param.is_contiguous() if in_order else layout.is_dense(param)
        self.weight = param if fits else _packed(param, in_order)
        self.grad_buffer: Tensor | None = None
        self.slots: list[Tensor] = []
        self.scales: list[Tensor | None] = []
        self.formats: list[StateFormat | None] = []
        self.weight_format: WeightFormat | None = None
        self.keys: tuple[int | None, ...] = ()
        self.rows: Tensor | None = None
        self.counted = False
        self.numbers: list[Tensor] = []
        self.mask: Tensor | None = None
        self.residual: Tensor | None = None
        self.counter: Tensor | None = None
        self.ema: Tensor | None = None
        self.ema_step: Tensor | None = None

    @property
    def grad_dtype(self) -> torch.dtype:
        """Dtype of the gradient."""
        assert self.param.grad is not None
        return self.param.grad.dtype

    @property
    def numel(self) -> int:
        """Stored real numbers."""
        return self.weight.numel() * (2 if self.weight.is_complex() else 1)


class Plan:
    """The segments of one step over all parameters that have a gradient."""

    def __init__(self, optimizer: "Stepper") -> None:
        groups = optimizer.param_groups
        streams.assign(optimizer)
        self.groups = [GroupOptions(optimizer.rule_of(group), group) for group in groups]
        self.lists = [list(group["params"]) for group in groups]
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
        check_distinct(self.updated, list(map(_address, self.updated)))
        self.resting = [s.param for s in self.idle]
        self.placed = [*self.updated, *self.resting]
        self.addresses = list(map(_address, self.placed))
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

    def _watch_gradients(self) -> None:
        grads: list[Any] = [s.param.grad for s in self.segments]
        self.guard = guard_of([*self.params, *self.resting, *grads])
        for segment, grad in zip(self.segments, grads, strict=True):
            if not layout.same_layout(grad, segment.weight):
                segment.grad_buffer = _grad_buffer(segment, grad)
        self.relaid = [s for s in self.segments if s.grad_buffer is not None]
        self.resolvable = [s for s, g in zip(self.segments, grads, strict=True) if layout.needs_resolving(g)]
        self.packed = [s for s in self.segments if s.weight is not s.param]
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
        params = self.params
        grads = list(map(_grad, params))
        try:
            if not self.guard.check(*params, *self.resting, *grads):
                return False
        except TypeError:  # a gradient went away
            return False
        if list(map(_address, self.placed)) != self.addresses:
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
        for segment in (*self.packed, *(s for s in self.idle if s.weight is not s.param)):
            segment.weight.copy_(segment.param.detach())

    def unpack(self) -> None:
        """Copy the buffers back and tell autograd that every parameter changed."""
        for segment in self.packed:
            segment.param.detach().copy_(segment.weight)
        torch.autograd.graph.increment_version(self.updated)
        self.masters.see()


def _still_sparse(s: Segment) -> bool:
    """The gradient is one that the plan was checked with (`check_supported`)."""
    grad = s.param.grad
    return grad is not None and grad.layout == torch.sparse_coo and (grad.sparse_dim() == 1 or not any(s.formats))


def in_order(p: Tensor, options: GroupOptions) -> bool:
    """Whether elements must lie in the order of their indices: matrix rules see rows and columns, groups are runs in a
    row, random numbers go by the index.
    """
    return options.rule.kernel_part is not None or needs_order(p, options.options, options.rule)


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


def _packed(param: Tensor, in_order: bool) -> Tensor:
    if layout.overlaps_itself(param):
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} has elements that share "
            "memory (an expanded tensor); make it a tensor of its own with .clone() before optimising it"
        )
    layout.warn_once(
        "packed",
        "a parameter with gaps between its elements (for a matrix rule, quantised state and stochastic rounding: one "
        "that is not contiguous) is packed and unpacked at every step; make it contiguous to save two copies",
    )
    memory_format = torch.contiguous_format if in_order else torch.preserve_format
    return torch.empty_like(param.detach(), memory_format=memory_format)


def _fits(grad: Tensor, weight: Tensor) -> bool:
    """Whether the gradient's memory can be walked as it is."""
    return layout.same_layout(grad, weight) and not layout.needs_resolving(grad)


def _like(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient's values in the parameter's layout."""
    return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


def _grad_buffer(segment: Segment, grad: Tensor) -> Tensor:
    if segment.weight is segment.param:
        layout.warn_once(
            "relaid",
            f"a gradient with strides {grad.stride()} is copied at every step into its parameter's layout "
            f"{segment.weight.stride()}; give both the same memory format to save the copy",
        )
    return torch.empty_like(segment.weight, dtype=grad.dtype)
