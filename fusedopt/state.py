"""State of a parameter: made lazily, torch-shaped, kept in its own dtype.

``state[p]`` holds what torch.optim would: ``step`` (0-dim fp32, fp64 under a float64 default dtype), one tensor like
the parameter or one number per slot, ``update_mask`` where one is set, ``ema`` and ``ema_step`` (``average.py``).
State that is there already (loaded, pre-created, on another device or in another layout) is taken over; only what is
missing is created.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt_kernels.numerics import FLOAT_TYPES, REAL_TYPE
from fusedopt_kernels.param import split16

from . import layout
from .rule import Slot
from .upload import capturing

if TYPE_CHECKING:
    from .groups import GroupOptions
    from .plan import Segment
    from .stepper import Stepper

MASK = "update_mask"
"""State key of an update mask: bool, like the parameter; False keeps an element as it is."""


def init_state(optimizer: "Stepper", segment: "Segment", options: "GroupOptions") -> None:
    """Create what is missing of a segment's state and hand the segment its tensors."""
    p, rule = segment.param, options.rule
    has_state = isinstance(optimizer.state.get(p), dict)
    if has_state or options.slots or rule.counts_in_state or "weights" in options.options:
        state = optimizer.state[p]
    else:
        state = {}
    if capturing():
        _check_ready(optimizer, p, state, options)
    fresh = all(state.get(slot.name) is None for slot in options.slots)
    if rule.counts_in_state:
        state["step"] = number_tensor(state.get("step", 0.0), p.device)
        segment.counter = state["step"]
    elif options.slots:
        segment.counter = _hidden_counter(optimizer, p, fresh)
    for slot in options.slots:
        like = _like(slot, segment)
        if like is not None:
            have = state.get(slot.name)
            if have is None:
                have = _make_slot(slot, like, segment, options)
            state[slot.name] = _fit(slot.name, have, like)
            segment.slots.append(state[slot.name])
    for slot in rule.scalar_slots:
        have = state.get(slot.name)
        state[slot.name] = number_tensor(_initial(slot, options) if have is None else have, p.device, slot.wide)
        segment.numbers.append(state[slot.name])
    if state.get(MASK) is not None:
        state[MASK] = _fit(MASK, state[MASK], segment.weight, (torch.bool,))
        segment.mask = layout.flat(state[MASK]).view(torch.uint8)
        if p.is_complex():  # one byte for each part
            segment.mask = segment.mask.repeat_interleave(2)
    if options.options.get("weights") == "split16":
        split16.codec(p.dtype)
        have = state.get("param_residual")
        state["param_residual"] = (
            split16.initial_residual(segment.weight)
            if have is None
            else _fit("param_residual", have, segment.weight, (torch.int16,))
        )
        segment.residual = state["param_residual"]


def _check_ready(optimizer: "Stepper", p: Tensor, state: dict[str, Any], options: "GroupOptions") -> None:
    """State cannot be made or moved inside a CUDA graph: every replay would do it again."""
    rule = options.rule
    slots = [slot for slot in options.slots if slot.shape is None or slot.shape(p) is not None]
    needed = [state.get(slot.name) for slot in (*slots, *rule.scalar_slots)]
    needed.extend([state[MASK]] if state.get(MASK) is not None else [])
    if rule.counts_in_state:
        needed.append(state.get("step"))
    elif options.slots:
        needed.append(optimizer._counters.get(p))
    if "weights" in options.options:
        needed.append(state.get("param_residual"))
    if not all(isinstance(have, Tensor) and have.device == p.device for have in needed):
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has no optimizer state on {p.device} yet, and a CUDA graph that "
            "made it would make it anew at every replay; step once before the capture"
        )


def _like(slot: Slot, segment: "Segment") -> Tensor | None:
    """A tensor as the slot should be laid out; None if the parameter has no such slot."""
    if slot.shape is None:
        return segment.weight
    shape = slot.shape(segment.param)
    return None if shape is None else segment.weight.new_empty(shape)


def _make_slot(slot: Slot, like: Tensor, segment: "Segment", options: "GroupOptions") -> Tensor:
    dtype = options.options.get("state_dtype", {}).get(slot.name)
    if dtype is None and "weights" in options.options:
        dtype = torch.float32
    if dtype is None:
        dtype = segment.param.dtype
        if slot.kind == "nonnegative" and dtype in (torch.bfloat16, torch.float16):
            layout.warn_once(
                "low-precision average",
                f"state {slot.name!r} takes its parameter's dtype, {dtype}, as torch.optim does: a running average "
                "of squares gets stuck at that precision; keep parameters in fp32 where you can",
            )
    state = torch.zeros_like(like.detach(), dtype=dtype, memory_format=torch.preserve_format)
    if slot.init == "param":
        return state.copy_(segment.param.detach())
    value = _initial(slot, options)
    # torch fills both parts of a complex state
    return state.fill_(complex(value, value) if state.is_complex() else value)


def _initial(slot: Slot, options: "GroupOptions") -> float:
    """What a slot's numbers begin as."""
    if isinstance(slot.init, str):
        return 0.0 if slot.init == "zeros" else float(options.hyper(slot.init))
    return float(slot.init)


def _fit(name: str, have: Tensor, weight: Tensor, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
    """State on the parameter's device and in its layout; values and dtype stay. dtypes: () for any of wide.py's."""
    dtypes = dtypes or (tuple(REAL_TYPE) if weight.is_complex() else FLOAT_TYPES)
    if have.shape != weight.shape or have.dtype not in dtypes:
        raise RuntimeError(
            f"optimizer state {name!r} of shape {tuple(have.shape)} and dtype {have.dtype} does not fit a parameter "
            f"of shape {tuple(weight.shape)} and dtype {weight.dtype}; load a checkpoint of this model or clear "
            "optimizer.state"
        )
    if have.device == weight.device and layout.same_layout(have, weight):
        return have
    return torch.empty_like(weight.detach(), dtype=have.dtype).copy_(have)


def number_tensor(x: Any, device: torch.device, wide: bool = False) -> Tensor:
    """A step count or scalar slot as a 0-dim tensor on its parameter's device (numbers and CPU tensors are taken)."""
    if not isinstance(x, Tensor):
        dtype = torch.float64 if wide or torch.get_default_dtype() == torch.float64 else torch.float32
        return torch.tensor(float(x), dtype=dtype, device=device)
    if x.device == device and x.dtype in (torch.float32, torch.float64):
        return x
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return x.to(device=device, dtype=dtype)


def _hidden_counter(optimizer: "Stepper", p: Tensor, fresh: bool) -> Tensor:
    """Step count of a rule for which torch keeps none: zero when its state is new, else past the first step."""
    have = optimizer._counters.get(p)
    if have is None or fresh or have.device != p.device:
        have = torch.tensor(0.0 if fresh else 1.0, dtype=torch.float32, device=p.device)
        optimizer._counters[p] = have
    return have


def drop_counters(optimizer: "Stepper") -> None:
    """Forget hidden step counts of parameters whose state is gone, so that those can be freed."""
    gone = [p for p in optimizer._counters if p not in optimizer.state]
    for p in gone:
        del optimizer._counters[p]
