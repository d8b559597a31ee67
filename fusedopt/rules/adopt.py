"""ADOPT: Adam that divides by the second moment of the steps before, and averages what is divided.

    v ← g²                                 first step, which does no more
    u ← g/max(√v, ε)                       v does not hold g yet
    u ← min(max(u, −c), c)                 c = (t − 1)^clip_exp
    m ← m + (1 − β₁)·(u − m)
    p ← p − lr·m
    v ← v + (1 − β₂)·(g² − v)

Source: Taniguchi, Harada, Minegishi, Oshima, Jeong, Nagahara, Iiyama, Suzuki, Iwasawa, Matsuo (2024), "ADOPT: Modified
Adam Can Converge with Any β₂ with the Optimal Rate", Algorithm 2 and its clipping with cₜ = t^¼, where t counts from
the second step. Arguments, defaults and weight decay (L2, or decoupled from the second step on) are those of its
authors' code, but for the clipping: code has a function of the step, here it is an exponent that kernels can read.
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
    power,
    power_eager,
    sqrt,
)  # fmt: skip

from ..arguments import check_beta_range, check_lr, check_nonnegative, check_positive
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, maximum_eager, minimum_eager, sqrt_eager

STATE = (Slot("exp_avg", "signed"), Slot("exp_avg_sq", "nonnegative"))


@triton.jit
def scalars(hyper, t):
    lr, weight_decay, beta1, beta2, eps, clip_exp = hyper
    first = tl.where(t <= 1.0, 1.0, 0.0)
    rate = tl.where(t <= 1.0, 0.0, lr)
    w1 = average_weight(1.0 - beta1)
    w2 = average_weight(tl.where(t <= 1.0, 1.0, 1.0 - beta2))
    clip = power(t - 1.0, clip_exp)
    return w1, w2, eps, clip, first, rate, rate * weight_decay


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, weight_decay, beta1, beta2, eps, clip_exp = hyper
    first = 1.0 if t <= 1.0 else 0.0
    rate = 0.0 if t <= 1.0 else lr
    w1 = average_weight_eager(1.0 - beta1)
    w2 = average_weight_eager(1.0 if t <= 1.0 else 1.0 - beta2)
    clip = power_eager(t - 1.0, clip_exp)
    return w1, w2, eps, clip, first, rate, rate * weight_decay


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w1, w2, eps, clip, first, rate = s
    u = div(g, maximum(sqrt(state[1], EXACT), eps), EXACT)
    if VARIANT[0]:
        u = tl.minimum(maximum(u, 0.0 - clip), clip, propagate_nan=tl.PropagateNan.ALL)
    m = tl.where(first != 0.0, state[0], average(state[0], u, w1))
    v = average(state[1], g * g, w2)
    return rate * m, (m, v)


def update_eager(g, p, state, s, VARIANT):
    w1, w2, eps, clip, first, rate = s
    u = div_eager(g, maximum_eager(sqrt_eager(state[1]), eps))
    if VARIANT[0]:
        u = minimum_eager(maximum_eager(u, 0.0 - clip), clip)
    m = state[0] if first != 0.0 else average_eager(state[0], u, w1)
    v = average_eager(state[1], g * g, w2)
    return rate * m, (m, v)


RULE = Rule(
    name="adopt",
    hyper=("betas.0", "betas.1", "eps", "clip_exp"),
    state=STATE,
    n_scalars=6,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    structure=("clip_exp",),
    decoupled_key="decouple",
)


class ADOPT(FusedOptimizer):
    """ADOPT; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        betas: decay rates (β₁, β₂) of the moments, default (0.9, 0.9999).
        eps: ε, the least that is divided by; default 1e-6.
        clip_exp: exponent of the clipping, default 0.25; None: no clipping.
        weight_decay: default 0, coupled. decouple: p ← p − lr·weight_decay·p instead of L2.
        maximize: ascend. foreach, capturable, fused: checked as torch does, then select nothing.
        differentiable: refused when True.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, eps or weight_decay, a beta outside [0, 1), a clip_exp not above 0.
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_exp: float | None = 0.25,
        weight_decay: float = 0.0,
        decouple: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr, foreach, capturable)
        check_beta_range(betas)
        check_nonnegative("epsilon", eps)
        check_nonnegative("weight_decay", weight_decay)
        if clip_exp is not None:
            check_positive("clip_exp", clip_exp)
        defaults = dict(
            lr=lr, betas=betas, eps=eps, clip_exp=clip_exp, weight_decay=weight_decay, decouple=decouple,
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
