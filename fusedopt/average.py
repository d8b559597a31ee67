"""The running average of the weights: its state, reading it, and evaluating with it.

``state[p]["ema"]`` is the average, fp32 (fp64, complex64, complex128) like the parameter, and ``state[p]["ema_step"]``
counts the steps averaged so far. ``average_step.py`` and the update kernel keep both up to date.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt_kernels.numerics import compute_type

from . import shards
from .formats import weight_format
from .groups import GroupOptions
from .options import KEY
from .rule import Rule
from .state import _initial, fit, held_format, number_tensor, take_residual
from .upload import capturing

if TYPE_CHECKING:
    from .segment import Segment
    from .stepper import Stepper

EMA, EMA_STEP = "ema", "ema_step"
"""State keys."""

_EXACT = (torch.float32, torch.float64, torch.complex64, torch.complex128)
"""What averages are kept in."""


def is_averaged(p: Tensor) -> bool:
    """Whether a parameter of a group with ``ema_decay`` is averaged: all are that hold real or complex numbers."""
    return p.is_floating_point() or p.is_complex()


def init_ema(optimizer: "Stepper", segment: "Segment") -> None:
    """Create a parameter's average, a copy of what its format holds, or take over the one there, for a segment.

    Raises:
        RuntimeError: a loaded average does not fit, or a CUDA graph is being captured and there is none yet.
    """
    p, group = segment.local, optimizer.param_groups[segment.group]
    state = shards.local_state(optimizer.state[segment.param], segment.param)
    have, count = state.get(EMA), state.get(EMA_STEP)
    if capturing() and not all(isinstance(x, Tensor) and x.device == p.device for x in (have, count)):
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has no weight average on {p.device} yet, and a CUDA graph that "
            "made it would make it anew at every replay; step once before the capture"
        )
    dtype = p.dtype if p.is_complex() else compute_type(p.dtype)
    _add_numbers(state, p, optimizer.rule_of(group), group)
    form = segment.weight_format = weight_format(p, group.get(KEY, {}))
    if form is not None and segment.residual is None and held_format(p, state) is not None:
        take_residual(segment, state)  # a parameter without a gradient has not been given it yet
    elif form is not None and segment.residual is None:
        segment.weight_format = None
    if have is not None and have.dtype != dtype and have.dtype in _EXACT:
        have = have.to(dtype)  # the parameter changed its dtype (`model.double()`)
    if have is None:
        value = p.detach() if form is None or segment.residual is None else form.load(p.detach(), segment.residual)
        have = torch.empty_like(segment.weight.detach(), dtype=dtype).copy_(value)
    state[EMA] = segment.ema = fit(EMA, have, segment.weight, (dtype,))
    state[EMA_STEP] = segment.ema_step = number_tensor(0.0 if count is None else count, p.device)


def _add_numbers(state: shards.State, p: Tensor, rule: Rule, group: dict[str, Any]) -> None:
    """Step count and scalar slots for torch.optim, which looks for them wherever a parameter has state."""
    if rule.counts_in_state and state.get("step") is None:
        state["step"] = number_tensor(0.0, p.device)
    for slot in rule.scalar_slots:
        if state.get(slot.name) is None:
            state[slot.name] = number_tensor(_initial(slot, GroupOptions(rule, group)), p.device, slot.wide)


def _averaged(optimizer: "Stepper") -> list[tuple[int, Tensor]]:
    """(group, parameter) of everything that is averaged, in order.

    Raises:
        RuntimeError: nothing is.
    """
    groups = optimizer.param_groups
    averaged = [i for i, group in enumerate(groups) if group.get(KEY, {}).get("ema_decay") is not None]
    if not averaged:
        raise RuntimeError(
            "no param_group keeps an average of its weights: pass ema_decay, such as ema_decay=0.999, to the optimizer"
        )
    return [(i, p) for i in averaged for p in groups[i]["params"] if is_averaged(p)]


def ema_parameters(optimizer: "Stepper") -> list[Tensor]:
    """See `FusedOptimizer.ema_parameters`."""
    from .segment import Segment  # segment.py and plan.py need this module

    found = []
    with torch.inference_mode(False), torch.no_grad():
        for index, p in _averaged(optimizer):
            have = optimizer.state[p].get(EMA)
            if have is None or have.shape != p.shape:
                init_ema(optimizer, Segment(p, index, 0))
            found.append(optimizer.state[p][EMA])
    return found


@contextmanager
def swap_ema(optimizer: "Stepper") -> Iterator[None]:
    """See `FusedOptimizer.swap_ema`."""
    refuse_swapped(optimizer, "swap_ema()")
    params, averages = [p for _, p in _averaged(optimizer)], ema_parameters(optimizer)
    with torch.inference_mode(False), torch.no_grad():
        kept = [p.detach().clone() for p in params]
    optimizer._swapped = True
    try:
        _write(params, averages)
        yield
    finally:
        _write(params, kept)
        optimizer._swapped = False


def _write(params: list[Tensor], values: list[Tensor]) -> None:
    """In place, so that whatever holds an address of a parameter stays valid; a detached tensor shares its version."""
    with torch.inference_mode(False), torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.detach().copy_(value)


def refuse_swapped(optimizer: "Stepper", action: str) -> None:
    """Refuse what would mistake averages for the weights.

    Raises:
        RuntimeError: inside `swap_ema`.
    """
    if optimizer._swapped:
        raise RuntimeError(
            f"{action} was called inside `with optimizer.swap_ema():`, where the parameters hold their averages; leave "
            "the context first, which brings the training weights back"
        )
