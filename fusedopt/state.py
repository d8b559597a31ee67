"""State of a parameter: made lazily, torch-shaped, kept in its own dtype.

``state[p]`` holds what torch.optim would: ``step`` (0-dim fp32, fp64 under a float64 default dtype), one tensor like
the parameter or one number per slot, ``update_mask`` where one is set, ``ema`` and ``ema_step`` (``average.py``).
State that is there already (loaded, pre-created, on another device or in another layout) is taken over; only what is
missing is created.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt_kernels.numerics import FLOAT_TYPES, REAL_TYPE
from fusedopt_kernels.param.format import WeightFormat
from fusedopt_kernels.state.format import StateFormat

from . import layout, shards
from .encoded import encode, keys, recognise, values, zeros
from .formats import LOW, REAL, WEIGHTS, rounds_at_random, slot_storage, weight_format
from .rule import Slot
from .shards import State
from .upload import capturing

if TYPE_CHECKING:
    from .groups import GroupOptions
    from .segment import Segment
    from .stepper import Stepper

MASK = "update_mask"
"""State key of an update mask: bool, like the parameter; False keeps an element as it is."""

BESIDE = ("param_residual", "master_param")
"""State keys of what weight formats keep beside a weight."""


def init_state(optimizer: "Stepper", segment: "Segment", options: "GroupOptions") -> None:
    """Create what is missing of a segment's state, convert what is in another format, hand the segment its tensors."""
    p, rule, chosen = segment.local, options.rule, options.options
    segment.weight_format = weight_format(p, chosen)
    counts = rule.counts_in_state or _draws(segment, options)
    beside = None if segment.weight_format is None else segment.weight_format.key
    has_state = isinstance(optimizer.state.get(segment.param), dict)
    own = optimizer.state[segment.param] if has_state or options.slots or counts or beside else {}
    state = shards.local_state(own, segment.param)
    if capturing():
        _check_ready(optimizer, segment, state, options, counts)
    fresh = all(state.get(slot.name) is None and state.get(keys(slot.name)[0]) is None for slot in options.slots)
    if counts:
        # torch keeps none for this rule: its state is past the first step then
        start = 0.0 if rule.counts_in_state or fresh else 1.0
        state["step"] = number_tensor(state.get("step", start), p.device)
        segment.counter = state["step"]
    elif options.slots:
        segment.counter = _hidden_counter(optimizer, segment.param, fresh)
    for slot in options.slots:
        if (like := _like(slot, segment)) is not None:
            _take_slot(slot, like, segment, state, options)
    for slot in rule.scalar_slots:
        have = state.get(slot.name)
        state[slot.name] = number_tensor(_initial(slot, options) if have is None else have, p.device, slot.wide)
        segment.numbers.append(state[slot.name])
    if state.get(MASK) is not None:
        state[MASK] = fit(MASK, state[MASK], segment.weight, (torch.bool,))
        segment.mask = layout.flat(state[MASK]).view(torch.uint8)
        if p.is_complex():  # one byte for each part
            segment.mask = segment.mask.repeat_interleave(2)
    take_residual(segment, state)


def _draws(segment: "Segment", options: "GroupOptions") -> bool:
    """Whether random or dithered numbers round anything of a parameter; they go by its step count."""
    p, chosen = segment.param, options.options
    state = chosen.get("state_rounding") == "stochastic" and p.dtype in REAL and bool(options.slots)
    kept = (slot_storage(slot, p, chosen) for slot in options.slots)
    dithered = any(isinstance(x, StateFormat) and x.dithered for x in kept)
    return state or dithered or rounds_at_random(segment.weight_format, chosen)


def _take_slot(slot: Slot, like: Tensor, segment: "Segment", state: State, options: "GroupOptions") -> None:
    """Values, scales and format of a slot, in the state and in the segment; another format's are converted."""
    p, storage, coded = segment.local, slot_storage(slot, segment.param, options.options), keys(slot.name)
    if isinstance(storage, StateFormat):
        if not _is_kept_in(state, slot, p, storage):
            have = values(state, slot, p.shape)
            if have is None and slot.init == "zeros":
                made = zeros(storage, like)
            else:
                if have is None:
                    have = torch.full_like(like.detach(), _initial(slot, options), dtype=torch.float32)
                made = encode(fit(slot.name, have, p).to(p.device, torch.float32), storage)
            state.pop(slot.name, None)
            state.update(zip(coded, made, strict=True))
        for key in coded:
            state[key] = state[key].to(p.device).contiguous()
        segment.slots.append(state[coded[0]])
        segment.scales.append(state[coded[1]])
        segment.formats.append(storage)
        return
    have = values(state, slot, p.shape) if slot.shape is None else state.get(slot.name)
    if have is None:
        have = _make_slot(slot, like, segment, options, storage)
    elif not have.is_complex() and _is_cast(slot, p, have.dtype, options):
        have = have.to(storage)
    state[slot.name] = fit(slot.name, have, like)
    for key in coded if slot.shape is None else ():
        state.pop(key, None)
    segment.slots.append(state[slot.name])
    segment.scales.append(None)
    segment.formats.append(None)


def _is_kept_in(state: State, slot: Slot, p: Tensor, storage: StateFormat) -> bool:
    """Whether a slot is there, in this format; plain values beside codes are newer than they."""
    if state.get(slot.name) is not None or state.get(keys(slot.name)[0]) is None:
        return False
    return recognise(state, slot, p.shape) is storage


def _is_cast(slot: Slot, p: Tensor, dtype: torch.dtype, options: "GroupOptions") -> bool:
    """Whether plain values that are there take the dtype of new ones: where the group names it, or it is wider."""
    asked = options.options.get("state_dtype")
    if asked is not None and (slot.name in asked if isinstance(asked, Mapping) else slot.kind != "weight"):
        return True
    low = p.dtype in LOW and dtype in LOW
    return low and slot_storage(slot, p, options.options) == torch.float32  # no wide one depends on the shape


def take_residual(segment: "Segment", state: State) -> None:
    """What the weight's format keeps beside the weight, in the state and in the segment; other formats' is converted.

    Raises:
        RuntimeError: it is in no known format.
    """
    form, p = segment.weight_format, segment.local
    if p.dtype not in LOW:
        fold_residual(p, state)
    found = held_format(p, state)
    if found is not None and found.key is not None and found is not form:
        beside = fit(found.key, state[found.key], p, (found.dtype_beside(p),))
        del state[found.key]
        if form is not None and form.key is not None:
            x, made = found.load(p.detach(), beside), torch.empty_like(p.detach())
            state[form.key] = form.initial(made)
            form.store(x, made, state[form.key], None)
            p.detach().copy_(made)  # ties may be rounded another way
    if form is None or form.key is None:
        return
    have = state.get(form.key)
    made = form.initial(p.detach()) if have is None else have
    assert made is not None
    state[form.key] = segment.residual = fit(form.key, made, segment.weight, (form.dtype_beside(p),))


def fold_residual(p: Tensor, state: State) -> None:
    """Give a parameter that is of a wide dtype now what lay beside it when it was bf16 or fp16.

    Numbers that something else wrote since, which the narrow dtype does not hold, are left as they are.
    """
    for key in BESIDE:
        if not isinstance(have := state.get(key), Tensor) or not p.is_floating_point():
            continue
        low = have.dtype if have.dtype in LOW else torch.bfloat16
        before = p.detach().to(low)
        form = held_format(before, state)
        assert form is not None
        x = form.load(before, fit(key, have, before, (have.dtype,)))
        if form.key == "master_param":  # of either dtype
            same = (x.to(torch.bfloat16).to(p.dtype) == p) | (x.to(torch.float16).to(p.dtype) == p)
        else:
            same = before.to(p.dtype) == p
        del state[key]
        p.detach().copy_(torch.where(same, x.to(p.dtype), p.detach()))


def held_format(p: Tensor, state: State) -> WeightFormat | None:
    """The format of a low-precision parameter that its state is of; None: plain or rounded stochastically.

    Raises:
        RuntimeError: there is something of no known format.
    """
    for key in BESIDE:
        have = state.get(key)
        if isinstance(have, Tensor) and p.dtype in LOW:
            for form in WEIGHTS.values():
                if form.key == key and have.dtype == form.dtype_beside(p) and _holds(form, p.dtype):
                    return form
            raise RuntimeError(
                f"optimizer state {key!r} of dtype {have.dtype} belongs to no weight format of {p.dtype} parameters; "
                "load a checkpoint of this model or clear optimizer.state"
            )
    return None


def _holds(form: WeightFormat, dtype: torch.dtype) -> bool:
    try:
        form.codec(dtype, False)
    except ValueError:
        return False
    return True


def _check_ready(optimizer: "Stepper", segment: "Segment", state: State, options: "GroupOptions", counts: bool) -> None:
    """State cannot be made or moved inside a CUDA graph: every replay would do it again."""
    p, rule, form = segment.local, options.rule, segment.weight_format
    needed = [state.get(slot.name) for slot in rule.scalar_slots]
    for slot in options.slots:
        if slot.shape is None or slot.shape(p) is not None:
            storage = slot_storage(slot, segment.param, options.options)
            if isinstance(storage, StateFormat):
                ready = _is_kept_in(state, slot, p, storage)
                needed.extend(state.get(key) if ready else None for key in keys(slot.name))
            else:
                needed.append(state.get(slot.name))
    needed.extend([state[MASK]] if state.get(MASK) is not None else [])
    if counts:
        needed.append(state.get("step"))
    elif options.slots:
        needed.append(optimizer._counters.get(segment.param))
    if form is not None and form.key is not None:
        needed.append(state.get(form.key) if held_format(p, state) is form else None)
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


def _make_slot(slot: Slot, like: Tensor, segment: "Segment", options: "GroupOptions", dtype: torch.dtype) -> Tensor:
    told = any(name in options.options for name in ("state_dtype", "state_rounding"))
    if slot.kind == "nonnegative" and dtype in LOW and not told:
        layout.warn_once(
            "low-precision average",
            f"state {slot.name!r} takes its parameter's dtype, {dtype}, as torch.optim does: a running average of "
            "squares gets stuck at that precision; pass state_dtype='float32' or 'int8', or master_weights",
        )
    state = torch.zeros_like(like.detach(), dtype=dtype, memory_format=torch.preserve_format)
    if slot.init == "param":
        return state.copy_(segment.local.detach())
    value = _initial(slot, options)
    # torch fills both parts of a complex state
    return state.fill_(complex(value, value) if state.is_complex() else value)


def _initial(slot: Slot, options: "GroupOptions") -> float:
    """What a slot's numbers begin as."""
    if isinstance(slot.init, str):
        return 0.0 if slot.init == "zeros" else float(options.hyper(slot.init))
    return float(slot.init)


def fit(name: str, have: Tensor, weight: Tensor, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
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
    have, device = optimizer._counters.get(p), shards.here(p).device
    if have is None or fresh or have.device != device:
        have = torch.tensor(0.0 if fresh else 1.0, dtype=torch.float32, device=device)
        optimizer._counters[p] = have
    return have


def drop_counters(optimizer: "Stepper") -> None:
    """Forget hidden step counts of parameters whose state is gone, so that those can be freed."""
    gone = [p for p in optimizer._counters if p not in optimizer.state]
    for p in gone:
        del optimizer._counters[p]
