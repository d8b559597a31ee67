"""SGD with momentum, dampening and Nesterov's look-ahead.

    b₁ ← g                                 first step (dampening does not act on it)
    bₜ ← μ·bₜ₋₁ + (1 − τ)·g                 momentum buffer
    d  ← g + μ·bₜ   if nesterov, else bₜ     (d ← g without momentum)
    p  ← p − lr·d

Source: Sutskever, Martens, Dahl, Hinton (2013), "On the importance of initialization and momentum in deep
learning", eqs. 1–4, in the form of torch.optim.SGD: lr multiplies the whole buffer, not each gradient on entry.
Weight decay is coupled (L2): g ← g + weight_decay·p. Results differ from torch's by rounding only.
"""

from collections.abc import Iterable
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from ..arguments import check_lr, check_nonnegative
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot

STATE = (Slot("momentum_buffer", "signed", when="momentum"),)


@triton.jit
def scalars(hyper, t):
    lr, _, mu, dampening = hyper
    first = t <= 1.0
    keep = tl.where(first, 0.0, mu)
    take = tl.where(first, 1.0, 1.0 - dampening)
    return lr, mu, keep, take


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, mu, dampening = hyper
    first = t <= 1.0
    keep = 0.0 if first else mu
    take = 1.0 if first else 1.0 - dampening
    return lr, mu, keep, take


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    lr, mu, keep, take = s
    d = g
    if VARIANT[0]:
        b = keep * state[0] + take * g
        d = g + mu * b if VARIANT[1] else b
        state = (b,)
    return lr * d, state


def update_eager(g, p, state, s, VARIANT):
    lr, mu, keep, take = s
    d = g
    if VARIANT[0]:
        b = keep * state[0] + take * g
        d = g + mu * b if VARIANT[1] else b
        state = (b,)
    return lr * d, state


RULE = Rule(
    name="sgd",
    hyper=("momentum", "dampening"),
    state=STATE,
    n_scalars=4,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    structure=("momentum", "nesterov"),
    counts_in_state=False,
    sparse="rows",
    moves_all="momentum",
)


class SGD(FusedOptimizer):
    """Stochastic gradient descent; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        momentum: μ, default 0. dampening: τ, default 0. weight_decay: L2 coefficient, default 0.
        nesterov: needs momentum > 0 and dampening 0.
        maximize: ascend. foreach, fused: checked as torch does, then select nothing.
        differentiable: refused when True.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, momentum or weight_decay; nesterov without momentum or with dampening.
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr, foreach, capturable=True)
        check_nonnegative("momentum", momentum)
        check_nonnegative("weight_decay", weight_decay)
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        super().__init__(params, defaults, **options)
