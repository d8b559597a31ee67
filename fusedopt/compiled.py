"""The step under torch.compile: one opaque custom op, so that fullgraph works and lr changes recompile nothing.

The op takes the real tensor lists as mutated arguments (a pointer table would hide the mutation from the compiler)
and an integer handle; of flattened parameters the list holds the buffers. Hyper-parameters are read when it runs,
never when it is traced. A compiler may hand the op copies of what it mutates and copy them back afterwards: then the
values go through the optimizer's own tensors.
"""

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import layout
from .average import EMA
from .shards import is_dtensor

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

_handles = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, "FusedOptimizer"] = weakref.WeakValueDictionary()


def handle_of(optimizer: "FusedOptimizer") -> int:
    """A number that stands for the optimizer inside compiled graphs."""
    handle = next(_handles)
    _optimizers[handle] = optimizer
    return handle


def step(optimizer: "FusedOptimizer") -> None:
    """What the tracer sees of a step."""
    params, grads, states = _tensors(optimizer)
    if any(map(is_dtensor, params)):
        raise RuntimeError("step() of DTensor parameters does not work under torch.compile: call it outside the graph")
    _step_op(list(optimizer._written) or params, grads, states, optimizer._handle)


def _tensors(optimizer: "FusedOptimizer") -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters with a gradient, their gradients, and all state that a step changes, in a fixed order."""
    params, grads, states = [], [], []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p] if p in optimizer.state else {}
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
            if p.grad is not None or EMA in state:  # a weight is averaged without a gradient too
                states.extend(v for v in state.values() if isinstance(v, Tensor))
    return params, grads, states


# A CUDA graph made by the compiler would keep the float hyper-parameters of the step that it recorded.
TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@torch.library.custom_op("fusedopt::step", mutates_args=("params", "states"), tags=TAGS)
def _step_op(params: list[Tensor], grads: list[Tensor], states: list[Tensor], handle: int) -> None:
    optimizer = _optimizers[handle]
    own_params, own_grads, own_states = _tensors(optimizer)
    written = optimizer._written or own_params
    pairs = list(zip((*written, *own_states), (*params, *states), strict=True))
    copies = [(own, given) for own, given in pairs if own.data_ptr() != given.data_ptr()]
    if copies:
        layout.warn_once(
            "compiled copies",
            "the compiler gave fusedopt's step copies of the tensors it updates; they are copied back at every step",
        )
    with torch.no_grad():
        for own, given in copies:
            own.copy_(given)
        moved = [own.data_ptr() != given.data_ptr() for own, given in zip(own_grads, grads, strict=True)]
        optimizer._step(grads if any(moved) else None)
        for own, given in copies:
            given.copy_(own)


@_step_op.register_fake
def _(params: list[Tensor], grads: list[Tensor], states: list[Tensor], handle: int) -> None:
    return None
