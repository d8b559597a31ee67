"""The step under torch.compile: one opaque custom op, so that fullgraph works and lr changes recompile nothing.

The op takes the real tensor lists as mutated arguments (a pointer table would hide the mutation from the compiler)
and an integer handle; hyper-parameters are read when it runs, never when it is traced.
"""

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

_handles = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, "FusedOptimizer"] = weakref.WeakValueDictionary()


@torch.library.custom_op("fusedopt::step", mutates_args=("params", "states"))
def _step_op(params: list[Tensor], grads: list[Tensor], states: list[Tensor], handle: int) -> None:
    with torch.no_grad():
        _optimizers[handle]._step()


@_step_op.register_fake
def _(params: list[Tensor], grads: list[Tensor], states: list[Tensor], handle: int) -> None:
    return None


def handle_of(optimizer: "FusedOptimizer") -> int:
    """A number that stands for the optimizer inside compiled graphs."""
    handle = next(_handles)
    _optimizers[handle] = optimizer
    return handle


def step(optimizer: "FusedOptimizer") -> None:
    """What the tracer sees of a step."""
    params, grads, states = [], [], []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                states.extend(v for v in optimizer.state[p].values() if isinstance(v, Tensor))
    _step_op(params, grads, states, optimizer._handle)
