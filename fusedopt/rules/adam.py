"""Adam, with AMSGrad.

    m ← m + (1 − β₁)·(g − m)               first moment
    v ← v + (1 − β₂)·(g² − v)              second moment
    v̂ ← max(v̂, v)  if amsgrad, else v
    p ← p − lr/(1 − β₁ᵗ) · m / (√v̂/√(1 − β₂ᵗ) + ε)

Source: Kingma & Ba (2015), "Adam: A Method for Stochastic Optimization", Algorithm 1; AMSGrad: Reddi, Kale, Kumar
(2018), "On the Convergence of Adam and Beyond", Algorithm 2, with torch's choice to take the maximum before bias
correction. Weight decay is coupled (L2), or decoupled with ``decoupled_weight_decay``. Differs from torch.optim.Adam
by rounding only: averages are written m + (1−β)(g−m), from the nearer end, and decay and update are summed before
the one rounding.
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
    sqrt,
)  # fmt: skip

from ..arguments import check_betas, check_lr, check_nonnegative
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, maximum_eager, sqrt_eager, sqrt_scalar

STATE = (
    Slot("exp_avg", "signed"),
    Slot("exp_avg_sq", "nonnegative"),
    Slot("max_exp_avg_sq", "nonnegative", when="amsgrad"),
)


@triton.jit
def scalars(hyper, t):
    lr, _, beta1, beta2, eps = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    step_size = lr / one_minus_power(q1, t)
    correction = 1.0 / tl.sqrt(one_minus_power(q2, t))
    w1, w2 = average_weight(q1), average_weight(q2)
    return w1, w2, step_size, correction, eps


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, beta1, beta2, eps = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    step_size = lr / one_minus_power_eager(q1, t)
    correction = 1.0 / sqrt_scalar(one_minus_power_eager(q2, t))
    w1, w2 = average_weight_eager(q1), average_weight_eager(q2)
    return w1, w2, step_size, correction, eps


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w1, w2, step_size, correction, eps = s
    m = average(state[0], g, w1)
    v = average(state[1], g * g, w2)
    new = (m, v)
    if VARIANT[0]:
        v = maximum(state[2], v)
        new = (new[0], new[1], v)
    return step_size * div(m, sqrt(v, EXACT) * correction + eps, EXACT), new


def update_eager(g, p, state, s, VARIANT):
    w1, w2, step_size, correction, eps = s
    m = average_eager(state[0], g, w1)
    v = average_eager(state[1], g * g, w2)
    new = (m, v)
    if VARIANT[0]:
        v = maximum_eager(state[2], v)
        new = (new[0], new[1], v)
    return step_size * div_eager(m, sqrt_eager(v) * correction + eps), new


RULE = Rule(
    name="adam",
    hyper=("betas.0", "betas.1", "eps"),
    state=STATE,
    n_scalars=5,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    structure=("amsgrad",),
    sparse="lazy",
)


class Adam(FusedOptimizer):
    """Adam; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        betas: decay rates (β₁, β₂) of the moments, floats or one-element tensors, default (0.9, 0.999).
        eps: ε added to the root, default 1e-8. weight_decay: default 0, coupled.
        amsgrad: use the largest second moment so far. maximize: ascend.
        decoupled_weight_decay: p ← p − lr·weight_decay·p instead of L2 (this makes it AdamW).
        foreach, capturable, fused: checked as torch does, then select nothing (every step is capturable).
        differentiable: refused when True.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, eps or weight_decay, a beta outside [0, 1).
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr, foreach, capturable)
        check_nonnegative("epsilon", eps)
        betas = check_betas(betas, foreach, capturable)
        check_nonnegative("weight_decay", weight_decay)
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize,
            foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
