"""RMSprop, with momentum and centring.

    v ← v + (1 − α)·(g² − v)               second moment
    a ← a + (1 − α)·(g − a)  if centered    mean gradient
    r ← √(v − a²) + ε  if centered, else √v + ε
    b ← μ·b + g/r                          momentum buffer (b ← g/r without momentum)
    p ← p − lr·b

Source: Tieleman & Hinton (2012), "Lecture 6.5: rmsprop", COURSERA; centred: Graves (2013), "Generating Sequences With
Recurrent Neural Networks", eqs. 38–41, with ε outside the root as in torch.optim.RMSprop. Weight decay is coupled
(L2). Differs from torch by rounding only: averages are written v + (1−α)(g² − v), from the nearer end. As there, v − a²
of a gradient that hardly varies may round to below zero, and its root is NaN. An α above 1, for which torch gives NaN
from the first step on, is refused.
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

STATE = (
    Slot("square_avg", "nonnegative"),
    Slot("momentum_buffer", "signed", when="momentum"),
    Slot("grad_avg", "signed", when="centered"),
)


@triton.jit
def scalars(hyper, t):
    lr, _, alpha, eps, mu = hyper
    w = average_weight(1.0 - alpha)
    return lr, w, eps, mu


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, alpha, eps, mu = hyper
    w = average_weight_eager(1.0 - alpha)
    return lr, w, eps, mu


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    lr, w, eps, mu = s
    v = average(state[0], g * g, w)
    if VARIANT[1]:
        a = average(state[2 if VARIANT[0] else 1], g, w)
        d = div(g, sqrt(v - a * a, EXACT) + eps, EXACT)
    else:
        d = div(g, sqrt(v, EXACT) + eps, EXACT)
    new = (v,)
    if VARIANT[0]:
        d = mu * state[1] + d
        new = (v, d)
    if VARIANT[1]:
        new = new + (a,)
    return lr * d, new


def update_eager(g, p, state, s, VARIANT):
    lr, w, eps, mu = s
    v = average_eager(state[0], g * g, w)
    if VARIANT[1]:
        a = average_eager(state[2 if VARIANT[0] else 1], g, w)
        d = div_eager(g, sqrt_eager(v - a * a) + eps)
    else:
        d = div_eager(g, sqrt_eager(v) + eps)
    new = (v,)
    if VARIANT[0]:
        d = mu * state[1] + d
        new = (v, d)
    if VARIANT[1]:
        new = (*new, a)
    return lr * d, new


RULE = Rule(
    name="rmsprop",
    hyper=("alpha", "eps", "momentum"),
    state=STATE,
    n_scalars=4,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    structure=("momentum", "centered"),
    sparse="lazy",
    subtracts="centered",
)


class RMSprop(FusedOptimizer):
    """RMSprop; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-2.
        alpha: decay rate α of the averages, in [0, 1], default 0.99. eps: ε added to the root, default 1e-8.
        weight_decay: L2 coefficient, default 0. momentum: μ, default 0.
        centered: divide by the standard deviation, not the root mean square.
        maximize: ascend. foreach, capturable: checked as torch does, then select nothing (every step is capturable).
        differentiable: refused when True.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, eps, momentum or weight_decay, an alpha outside [0, 1].
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_nonnegative("epsilon", eps)
        check_nonnegative("momentum", momentum)
        check_nonnegative("weight_decay", weight_decay)
        check_unit("alpha", alpha)
        defaults = dict(
            lr=lr, momentum=momentum, alpha=alpha, eps=eps, centered=centered, weight_decay=weight_decay,
            capturable=capturable, foreach=foreach, maximize=maximize, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
