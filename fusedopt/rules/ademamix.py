"""AdEMAMix: Adam with a second, much slower average of the gradients.

    α ← alpha·min(t/T, 1)                  T is alpha_warmup; alpha without it
    r ← min(t/T, 1)                        T is beta3_warmup; 1 without it
    β ← min(exp(1/((1 − r)/ln β₁ + r/ln β₃)), β₃)
    m ← m + (1 − β₁)·(g − m)               fast average
    l ← l + (1 − β)·(g − l)                slow average
    v ← v + (1 − β₂)·(g² − v)              second moment
    p ← p − lr·((m/(1 − β₁ᵗ) + α·l)/(√v/√(1 − β₂ᵗ) + ε) + weight_decay·p)

Source: Pagliardini, Ablin, Grangier (2024), "The AdEMAMix Optimizer: Better, Faster, Older", Algorithm 1 and the
schedulers of section 3: the half-life of β grows linearly from β₁'s to β₃'s. Arguments and defaults are those of the
authors' code, which adds 1e-8 to β inside the logarithms; here they are as in the paper. The slow average has no bias
correction. Weight decay is decoupled.
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
    log,
    log_eager,
    one_minus_power,
    one_minus_power_eager,
    sqrt,
)  # fmt: skip

from ..arguments import check_lr, check_nonnegative, check_three_betas
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, sqrt_eager, sqrt_scalar

STATE = (Slot("exp_avg_fast", "signed"), Slot("exp_avg_slow", "signed"), Slot("exp_avg_sq", "nonnegative"))


@triton.jit
def scalars(hyper, t):
    lr, _, beta1, beta2, beta3, alpha, beta3_warmup, alpha_warmup, eps = hyper
    r = tl.where(t < beta3_warmup, t / beta3_warmup, 1.0)
    ln1, ln3 = tl.maximum(log(beta1), -700.0), tl.maximum(log(beta3), -700.0)
    grown = exp(1.0 / ((1.0 - r) / ln1 + r / ln3))
    beta = tl.where((r < 1.0) & (grown < beta3), grown, beta3)
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t.to(tl.int64)
    from_m = lr / one_minus_power(q1, n)
    from_l = lr * alpha * tl.where(t < alpha_warmup, t / alpha_warmup, 1.0)
    correction = 1.0 / tl.sqrt(one_minus_power(q2, n))
    w1, w2, w3 = average_weight(q1), average_weight(q2), average_weight(1.0 - beta)
    return w1, w2, w3, from_m, from_l, correction, eps


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, beta1, beta2, beta3, alpha, beta3_warmup, alpha_warmup, eps = hyper
    r = t / beta3_warmup if t < beta3_warmup else 1.0
    ln1, ln3 = max(log_eager(beta1), -700.0), max(log_eager(beta3), -700.0)
    grown = exp_eager(1.0 / ((1.0 - r) / ln1 + r / ln3))
    beta = grown if r < 1.0 and grown < beta3 else beta3
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t
    from_m = lr / one_minus_power_eager(q1, n)
    from_l = lr * alpha * (t / alpha_warmup if t < alpha_warmup else 1.0)
    correction = 1.0 / sqrt_scalar(one_minus_power_eager(q2, n))
    w1, w2, w3 = average_weight_eager(q1), average_weight_eager(q2), average_weight_eager(1.0 - beta)
    return w1, w2, w3, from_m, from_l, correction, eps


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w1, w2, w3, from_m, from_l, correction, eps = s
    m = average(state[0], g, w1)
    slow = average(state[1], g, w3)
    v = average(state[2], g * g, w2)
    return div(from_m * m + from_l * slow, sqrt(v, EXACT) * correction + eps, EXACT), (m, slow, v)


def update_eager(g, p, state, s, VARIANT):
    w1, w2, w3, from_m, from_l, correction, eps = s
    m = average_eager(state[0], g, w1)
    slow = average_eager(state[1], g, w3)
    v = average_eager(state[2], g * g, w2)
    return div_eager(from_m * m + from_l * slow, sqrt_eager(v) * correction + eps), (m, slow, v)


RULE = Rule(
    name="ademamix",
    hyper=("betas.0", "betas.1", "betas.2", "alpha", "beta3_warmup", "alpha_warmup", "eps"),
    state=STATE,
    n_scalars=7,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    decay="decoupled",
)


class AdEMAMix(FusedOptimizer):
    """AdEMAMix; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        betas: decay rates (β₁, β₂, β₃) of the fast average, the squares and the slow average, default
            (0.9, 0.999, 0.9999).
        alpha: weight of the slow average, default 2.
        beta3_warmup, alpha_warmup: steps over which β grows from β₁ to β₃ and α from 0; None: none.
        eps: ε added to the root, default 1e-8. weight_decay: default 0, decoupled.
        maximize: ascend.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, alpha, warmup, eps or weight_decay, a beta outside [0, 1).
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_three_betas(betas)
        for name, value in dict(alpha=alpha, epsilon=eps, weight_decay=weight_decay).items():
            check_nonnegative(name, value)
        for name, value in dict(beta3_warmup=beta3_warmup, alpha_warmup=alpha_warmup).items():
            check_nonnegative(name, value or 0)
        defaults = dict(
            lr=lr, betas=betas, alpha=alpha, beta3_warmup=beta3_warmup, alpha_warmup=alpha_warmup, eps=eps,
            weight_decay=weight_decay, maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
