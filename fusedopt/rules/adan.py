"""Adan: Nesterov's momentum written with differences of successive gradients.

    d ← g − g₋₁                            0 on the first step
    m ← m + (1 − β₁)·(g − m)               average of gradients
    v ← v + (1 − β₂)·(d − v)               average of differences
    n ← n + (1 − β₃)·((g + β₂·d)² − n)     second moment of the look-ahead gradient
    u ← lr·(m/(1 − β₁ᵗ) + β₂·v/(1 − β₂ᵗ))/(√n/√(1 − β₃ᵗ) + ε)
    p ← (p − u)/(1 + lr·weight_decay)      or, with no_prox, p − u − lr·weight_decay·p

Source: Xie, Zhou, Li, Lin, Yan (2022), "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
Algorithm 1, in the form of its authors' code: β here is 1 − β there, bias corrections take the place of moments that
begin as the first gradients, and `no_prox` is theirs. State ``neg_pre_grad`` holds −g₋₁, as theirs.
The proximal step is written p − (u/(1 + w) + w/(1 + w)·p) with w = lr·weight_decay, which rounds once.
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
    one_minus_power,
    one_minus_power_eager,
    sqrt,
)  # fmt: skip

from ..arguments import check_lr, check_nonnegative, check_three_betas
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, sqrt_eager, sqrt_scalar

STATE = (
    Slot("exp_avg", "signed"),
    Slot("exp_avg_sq", "nonnegative"),
    Slot("exp_avg_diff", "signed"),
    Slot("neg_pre_grad", "signed"),
)


@triton.jit
def scalars(hyper, t):
    lr, weight_decay, beta1, beta2, beta3, eps, no_prox = hyper
    q1, q2, q3 = 1.0 - beta1, 1.0 - beta2, 1.0 - beta3
    n = t.to(tl.int64)
    decay = lr * weight_decay
    kept = tl.where(no_prox != 0.0, 1.0, 1.0 / (1.0 + decay))
    from_m = kept * lr / one_minus_power(q1, n)
    from_v = kept * lr * beta2 / one_minus_power(q2, n)
    correction = 1.0 / tl.sqrt(one_minus_power(q3, n))
    w1, w2, w3 = average_weight(q1), average_weight(q2), average_weight(q3)
    first = tl.where(t <= 1.0, 1.0, 0.0)
    return w1, w2, w3, beta2, from_m, from_v, correction, eps, first, kept * decay


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, weight_decay, beta1, beta2, beta3, eps, no_prox = hyper
    q1, q2, q3 = 1.0 - beta1, 1.0 - beta2, 1.0 - beta3
    n = t
    decay = lr * weight_decay
    kept = 1.0 if no_prox != 0.0 else 1.0 / (1.0 + decay)
    from_m = kept * lr / one_minus_power_eager(q1, n)
    from_v = kept * lr * beta2 / one_minus_power_eager(q2, n)
    correction = 1.0 / sqrt_scalar(one_minus_power_eager(q3, n))
    w1, w2, w3 = average_weight_eager(q1), average_weight_eager(q2), average_weight_eager(q3)
    first = 1.0 if t <= 1.0 else 0.0
    return w1, w2, w3, beta2, from_m, from_v, correction, eps, first, kept * decay


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w1, w2, w3, beta2, from_m, from_v, correction, eps, first = s
    last = tl.where(first != 0.0, 0.0 - g, state[3])
    d = g + last
    ahead = g + beta2 * d
    m = average(state[0], g, w1)
    n = average(state[1], ahead * ahead, w3)
    v = average(state[2], d, w2)
    return div(from_m * m + from_v * v, sqrt(n, EXACT) * correction + eps, EXACT), (m, n, v, 0.0 - g)


def update_eager(g, p, state, s, VARIANT):
    w1, w2, w3, beta2, from_m, from_v, correction, eps, first = s
    last = 0.0 - g if first != 0.0 else state[3]
    d = g + last
    ahead = g + beta2 * d
    m = average_eager(state[0], g, w1)
    n = average_eager(state[1], ahead * ahead, w3)
    v = average_eager(state[2], d, w2)
    return div_eager(from_m * m + from_v * v, sqrt_eager(n) * correction + eps), (m, n, v, 0.0 - g)


RULE = Rule(
    name="adan",
    hyper=("betas.0", "betas.1", "betas.2", "eps", "no_prox"),
    state=STATE,
    n_scalars=9,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    decay="decoupled",
)


class Adan(FusedOptimizer):
    """Adan; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        betas: decay rates (β₁, β₂, β₃) of the averages of g, d and squares, default (0.98, 0.92, 0.99).
        eps: ε added to the root, default 1e-8. weight_decay: default 0, a proximal step.
        no_prox: weight decay decoupled as in AdamW instead.
        maximize: ascend.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, eps or weight_decay, a beta outside [0, 1).
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        no_prox: bool = False,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_three_betas(betas)
        check_nonnegative("epsilon", eps)
        check_nonnegative("weight_decay", weight_decay)
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, no_prox=no_prox, maximize=maximize)
        super().__init__(params, defaults, **options)
