"""NAdam: Adam with Nesterov's look-ahead and a momentum schedule.

    μₜ ← β₁·(1 − ½·0.96^(t·ψ))              momentum at step t, ψ = momentum_decay
    P  ← P·μₜ                              product of all momenta so far
    m  ← m + (1 − β₁)·(g − m)              first moment
    v  ← v + (1 − β₂)·(g² − v)             second moment
    d  ← (1 − μₜ)/(1 − P) · g + μₜ₊₁/(1 − P·μₜ₊₁) · m
    p  ← p − lr · d/(√v/√(1 − β₂ᵗ) + ε)

Source: Dozat (2016), "Incorporating Nesterov Momentum into Adam", Algorithm 2, with its suggested schedule and, as in
torch.optim.NAdam, a first moment of constant β₁. Weight decay is coupled (L2), or decoupled with
``decoupled_weight_decay``. Differs from torch by rounding only: one division for both terms, averages from the nearer
end, decay and update summed before the one rounding, and P is used before it is rounded to its state's dtype.
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
    exp,
    exp_eager,
    one_minus_power,
    one_minus_power_eager,
    sqrt,
)  # fmt: skip

from ..arguments import check_beta_range, check_lr, check_nonnegative
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, sqrt_eager, sqrt_scalar

STATE = (
    Slot("exp_avg", "signed"),
    Slot("exp_avg_sq", "nonnegative"),
    Slot("mu_product", "scalar", 1.0),
)

LN_096 = tl.constexpr(-0.040821994520255166)  # ln 0.96


@triton.jit
def scalars(hyper, t, state):
    lr, _, beta1, beta2, eps, psi = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t.to(tl.int64)
    mu = beta1 * (1.0 - 0.5 * exp(t * psi * LN_096))
    mu_next = beta1 * (1.0 - 0.5 * exp((t + 1.0) * psi * LN_096))
    product = state[0] * mu
    from_g = lr * (1.0 - mu) / (1.0 - product)
    from_m = lr * mu_next / (1.0 - product * mu_next)
    correction = 1.0 / tl.sqrt(one_minus_power(q2, n))
    w1, w2 = average_weight(q1), average_weight(q2)
    return (w1, w2, from_g, from_m, correction, eps), (product,)


def scalars_eager(hyper: tuple[float, ...], t: float, state: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    lr, _, beta1, beta2, eps, psi = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t
    mu = beta1 * (1.0 - 0.5 * exp_eager(t * psi * LN_096.value))
    mu_next = beta1 * (1.0 - 0.5 * exp_eager((t + 1.0) * psi * LN_096.value))
    product = state[0] * mu
    from_g = lr * (1.0 - mu) / (1.0 - product)
    from_m = lr * mu_next / (1.0 - product * mu_next)
    correction = 1.0 / sqrt_scalar(one_minus_power_eager(q2, n))
    w1, w2 = average_weight_eager(q1), average_weight_eager(q2)
    return (w1, w2, from_g, from_m, correction, eps), (product,)


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w1, w2, from_g, from_m, correction, eps = s
    m = average(state[0], g, w1)
    v = average(state[1], g * g, w2)
    return div(from_g * g + from_m * m, sqrt(v, EXACT) * correction + eps, EXACT), (m, v)


def update_eager(g, p, state, s, VARIANT):
    w1, w2, from_g, from_m, correction, eps = s
    m = average_eager(state[0], g, w1)
    v = average_eager(state[1], g * g, w2)
    return div_eager(from_g * g + from_m * m, sqrt_eager(v) * correction + eps), (m, v)


RULE = Rule(
    name="nadam",
    hyper=("betas.0", "betas.1", "eps", "momentum_decay"),
    state=STATE,
    n_scalars=6,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
)


class NAdam(FusedOptimizer):
    """NAdam; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 2e-3.
        betas: decay rates (β₁, β₂) of the moments, default (0.9, 0.999). eps: ε added to the root, default 1e-8.
        weight_decay: default 0, coupled. momentum_decay: ψ, default 4e-3.
        decoupled_weight_decay: p ← p − lr·weight_decay·p instead of L2.
        maximize: ascend. foreach, capturable: checked as torch does, then select nothing (every step is capturable).
        differentiable: refused when True.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, eps, weight_decay or momentum_decay, a beta outside [0, 1).
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_nonnegative("epsilon", eps)
        check_beta_range(betas)
        check_nonnegative("weight_decay", weight_decay)
        check_nonnegative("momentum_decay", momentum_decay)
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
