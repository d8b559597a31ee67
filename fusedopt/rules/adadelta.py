"""Adadelta: gradients divided by their running root mean square and multiplied by that of the steps so far.

    v ← v + (1 − ρ)·(g² − v)               second moment of gradients
    Δ ← √(u + ε)/√(v + ε) · g
    u ← u + (1 − ρ)·(Δ² − u)               second moment of steps
    p ← p − lr·Δ

Source: Zeiler (2012), "ADADELTA: An Adaptive Learning Rate Method", Algorithm 1, which has lr = 1. Weight decay is
coupled (L2). Differs from torch.optim.Adadelta by rounding only: averages are written v + (1−ρ)(g² − v), from the
nearer end.
"""

from collections.abc import Iterable
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from fusedopt_kernels.numerics import average, average_eager, average_weight, average_weight_eager, div, sqrt

from ..arguments import check_lr, check_nonnegative, check_unit
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, sqrt_eager

STATE = (Slot("square_avg", "nonnegative"), Slot("acc_delta", "nonnegative"))


@triton.jit
def scalars(hyper, t):
    lr, _, rho, eps = hyper
    w = average_weight(1.0 - rho)
    return lr, w, eps


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, rho, eps = hyper
    w = average_weight_eager(1.0 - rho)
    return lr, w, eps


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    lr, w, eps = s
    v = average(state[0], g * g, w)
    delta = div(sqrt(state[1] + eps, EXACT), sqrt(v + eps, EXACT), EXACT) * g
    u = average(state[1], delta * delta, w)
    return lr * delta, (v, u)


def update_eager(g, p, state, s, VARIANT):
    lr, w, eps = s
    v = average_eager(state[0], g * g, w)
    delta = div_eager(sqrt_eager(state[1] + eps), sqrt_eager(v + eps)) * g
    u = average_eager(state[1], delta * delta, w)
    return lr * delta, (v, u)


RULE = Rule(
    name="adadelta",
    hyper=("rho", "eps"),
    state=STATE,
    n_scalars=3,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
)


class Adadelta(FusedOptimizer):
    """Adadelta; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: factor of every step, float or one-element tensor; default 1.0.
        rho: decay rate ρ of both averages, in [0, 1], default 0.9. eps: ε inside both roots, default 1e-6.
        weight_decay: L2 coefficient, default 0.
        maximize: ascend. foreach, capturable: checked as torch does, then select nothing (every step is capturable).
        differentiable: refused when True.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, eps or weight_decay, a rho outside [0, 1].
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_unit("rho", rho)
        check_nonnegative("epsilon", eps)
        check_nonnegative("weight_decay", weight_decay)
        defaults = dict(
            lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, maximize=maximize, capturable=capturable,
            foreach=foreach, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
