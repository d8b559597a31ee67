"""Adagrad: gradients divided by the root of the sum of all their squares.

    lrₜ ← lr/(1 + (t − 1)·lr_decay)
    s   ← s + g²                            sum of squares, begins at initial_accumulator_value
    p   ← p − lrₜ · g/(√s + ε)

Source: Duchi, Hazan, Singer (2011), "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
Figure 1 (diagonal matrices). Weight decay is coupled (L2). Differs from torch.optim.Adagrad by rounding only, and in
when state is made: torch makes it in the constructor, here it comes with the first step or `materialize_state()`, so
that frameworks may still replace parameters; a group's own initial_accumulator_value, which torch ignores, counts.
"""

from collections.abc import Iterable
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from fusedopt_kernels.numerics import div, sqrt

from ..arguments import check_lr, check_nonnegative
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, sqrt_eager

STATE = (Slot("sum", "nonnegative", "initial_accumulator_value"),)


@triton.jit
def scalars(hyper, t):
    lr, _, lr_decay, eps = hyper
    step_size = lr / (1.0 + (t - 1.0) * lr_decay)
    return step_size, eps


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, lr_decay, eps = hyper
    step_size = lr / (1.0 + (t - 1.0) * lr_decay)
    return step_size, eps


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    step_size, eps = s
    total = state[0] + g * g
    return step_size * div(g, sqrt(total, EXACT) + eps, EXACT), (total,)


def update_eager(g, p, state, s, VARIANT):
    step_size, eps = s
    total = state[0] + g * g
    return step_size * div_eager(g, sqrt_eager(total) + eps), (total,)


RULE = Rule(
    name="adagrad",
    hyper=("lr_decay", "eps"),
    state=STATE,
    n_scalars=2,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    sparse="rows",
)


class Adagrad(FusedOptimizer):
    """Adagrad; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-2.
        lr_decay: lr falls as 1/(1 + (t − 1)·lr_decay), default 0. weight_decay: L2 coefficient, default 0.
        initial_accumulator_value: what the sum begins as (both parts of a complex one), default 0.
        eps: ε added to the root, default 1e-10.
        maximize: ascend. foreach, fused: checked as torch does, then select nothing.
        differentiable: refused when True.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, lr_decay, weight_decay, initial_accumulator_value or eps.
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_nonnegative("lr_decay", lr_decay)
        check_nonnegative("weight_decay", weight_decay)
        check_nonnegative("initial_accumulator_value", initial_accumulator_value)
        check_nonnegative("epsilon", eps)
        defaults = dict(
            lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value, foreach=foreach, maximize=maximize,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    def share_memory(self) -> None:
        """Make all state now and move it to shared memory, for training from several processes."""
        self.materialize_state()
        for state in self.state.values():
            for value in state.values():
                value.share_memory_()
        self._forget_plan()
