"""Adamax: Adam with the infinity norm.

    m ← m + (1 − β₁)·(g − m)               first moment
    u ← max(β₂·u, |g| + ε)                 decayed infinity norm
    p ← p − lr/(1 − β₁ᵗ) · m/u

Source: Kingma & Ba (2015), "Adam: A Method for Stochastic Optimization", Algorithm 2, with torch's ε added to |g|.
Weight decay is coupled (L2). Differs from torch.optim.Adamax by rounding only: the average is written from the nearer
end.
"""

from collections.abc import Iterable
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from fusedopt_kernels.numerics import (
    average,
    average_eager,
    average_weight,
    average_weight_eager,
    div,
    maximum,
    one_minus_power,
    one_minus_power_eager,
)  # fmt: skip

from ..arguments import check_beta_range, check_lr, check_nonnegative
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, maximum_eager

STATE = (Slot("exp_avg", "signed"), Slot("exp_inf", "nonnegative"))


@triton.jit
def scalars(hyper, t):
    lr, _, beta1, beta2, eps = hyper
    q1 = 1.0 - beta1
    n = t.to(tl.int64)
    step_size = lr / one_minus_power(q1, n)
    w1 = average_weight(q1)
    return w1, beta2, step_size, eps


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, beta1, beta2, eps = hyper
    q1 = 1.0 - beta1
    n = t
    step_size = lr / one_minus_power_eager(q1, n)
    w1 = average_weight_eager(q1)
    return w1, beta2, step_size, eps


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w1, beta2, step_size, eps = s
    m = average(state[0], g, w1)
    u = maximum(beta2 * state[1], tl.abs(g) + eps)
    return step_size * div(m, u, EXACT), (m, u)


def update_eager(g, p, state, s, VARIANT):
    w1, beta2, step_size, eps = s
    m = average_eager(state[0], g, w1)
    u = maximum_eager(beta2 * state[1], g.abs() + eps)
    return step_size * div_eager(m, u), (m, u)


RULE = Rule(
    name="adamax",
    hyper=("betas.0", "betas.1", "eps"),
    state=STATE,
    n_scalars=4,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
)


class Adamax(FusedOptimizer):
    """Adamax; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 2e-3.
        betas: decay rates (β₁, β₂) of moment and norm, default (0.9, 0.999).
        eps: ε added to |g|, default 1e-8. weight_decay: L2 coefficient, default 0.
        maximize: ascend. foreach, capturable: checked as torch does, then select nothing (every step is capturable).
        differentiable: refused when True.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, eps or weight_decay, a beta outside [0, 1).
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_nonnegative("epsilon", eps)
        check_beta_range(betas)
        check_nonnegative("weight_decay", weight_decay)
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach, maximize=maximize,
            differentiable=differentiable, capturable=capturable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
