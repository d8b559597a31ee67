"""LAMB: Adam's direction, scaled in each parameter to the length of the parameter.

    m ← m + (1 − β₁)·(g − m)               first moment
    v ← v + (1 − β₂)·(g² − v)              second moment
    u ← m/(1 − β₁ᵗ) / (√v/√(1 − β₂ᵗ) + ε) + weight_decay·p
    φ ← min(max(‖p‖, γₗ), γᵤ)
    p ← p − lr·φ/‖u‖·u                     the ratio is 1 where φ or ‖u‖ is 0

Source: You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer, Hsieh (2020), "Large Batch Optimization for
Deep Learning: Training BERT in 76 minutes", Algorithm 2, each parameter tensor being a layer; the ratio at norms of
zero, of which the paper says nothing, is its authors' code's. ‖p‖ and ‖u‖ are measured in a first pass. Not taken over
from NVIDIA's variant: a clip of the global norm before the step, and a ratio of 1 for parameters without weight decay.
"""

from collections.abc import Iterable
from math import inf
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

from ..arguments import check_beta_range, check_lr, check_nonnegative, check_pair
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, sqrt_eager, sqrt_scalar

STATE = (Slot("exp_avg", "signed"), Slot("exp_avg_sq", "nonnegative"))


@triton.jit
def scalars(hyper, t):
    lr, weight_decay, beta1, beta2, eps, low, high, corrected = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t.to(tl.int64)
    correction1 = tl.where(corrected != 0.0, 1.0 / one_minus_power(q1, n), 1.0)
    correction2 = tl.where(corrected != 0.0, 1.0 / tl.sqrt(one_minus_power(q2, n)), 1.0)
    w1, w2 = average_weight(q1), average_weight(q2)
    return w1, w2, correction1, correction2, eps, weight_decay, lr, low, high


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, weight_decay, beta1, beta2, eps, low, high, corrected = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t
    correction1 = 1.0 / one_minus_power_eager(q1, n) if corrected != 0.0 else 1.0
    correction2 = 1.0 / sqrt_scalar(one_minus_power_eager(q2, n)) if corrected != 0.0 else 1.0
    w1, w2 = average_weight_eager(q1), average_weight_eager(q2)
    return w1, w2, correction1, correction2, eps, weight_decay, lr, low, high


@triton.jit
def direction(g, p, state, s, EXACT: tl.constexpr):
    m = average(state[0], g, s[0])
    v = average(state[1], g * g, s[1])
    u = div(s[2] * m, sqrt(v, EXACT) * s[3] + s[4], EXACT)
    return tl.where(s[5] != 0.0, u + s[5] * p, u), (m, v)


def direction_eager(g, p, state, s):
    m = average_eager(state[0], g, s[0])
    v = average_eager(state[1], g * g, s[1])
    u = div_eager(s[2] * m, sqrt_eager(v) * s[3] + s[4])
    return u + s[5] * p if s[5] != 0.0 else u, (m, v)


@triton.jit
def measure(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    u, _ = direction(g, p, state, s, EXACT)
    return p, u


def measure_eager(g, p, state, s, VARIANT):
    u, _ = direction_eager(g, p, state, s)
    return p, u


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    lr, low, high, p_norm, u_norm = s[6], s[7], s[8], s[9], s[10]
    u, new = direction(g, p, state, s, EXACT)
    phi = tl.minimum(tl.maximum(p_norm, low), high)
    some = (phi > 0.0) & (u_norm > 0.0)
    ratio = tl.where(some, div(phi, tl.where(some, u_norm, 1.0), EXACT), 1.0)
    return (lr * ratio) * u, new


def update_eager(g, p, state, s, VARIANT):
    lr, low, high, p_norm, u_norm = s[6], s[7], s[8], s[9], s[10]
    u, new = direction_eager(g, p, state, s)
    phi = min(max(p_norm, low), high)
    some = phi > 0.0 and u_norm > 0.0
    ratio = div_eager(phi, u_norm) if some else 1.0
    return (lr * ratio) * u, new


RULE = Rule(
    name="lamb",
    hyper=("betas.0", "betas.1", "eps", "phi_range.0", "phi_range.1", "bias_correction"),
    state=STATE,
    n_scalars=9,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    decay="own",
    n_norms=2,
    measure=measure,
    measure_eager=measure_eager,
)


class LAMB(FusedOptimizer):
    """LAMB; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        betas: decay rates (β₁, β₂) of the moments, default (0.9, 0.999). eps: ε added to the root, default 1e-6.
        weight_decay: added to the direction before its norm is taken, default 0.
        phi_range: (γₗ, γᵤ), what ‖p‖ is held between; default (0, inf), the identity.
        bias_correction: as in the paper's last version, default True; False is that of its first ones.
        maximize: ascend.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, eps or weight_decay, a beta outside [0, 1), a phi_range that is none.
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        phi_range: tuple[float, float] = (0.0, inf),
        bias_correction: bool = True,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_beta_range(betas)
        check_nonnegative("epsilon", eps)
        check_nonnegative("weight_decay", weight_decay)
        check_pair("phi_range", phi_range, ("low", "high"))
        if not 0.0 <= phi_range[0] <= phi_range[1]:
            raise ValueError(f"Invalid phi_range: {phi_range}; it must be 0 <= low <= high")
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, phi_range=phi_range,
            bias_correction=bias_correction, maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
