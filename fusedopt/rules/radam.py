"""RAdam: Adam that waits until the variance of its step is bounded, and then rectifies it.

    m  ← m + (1 − β₁)·(g − m)              first moment
    v  ← v + (1 − β₂)·(g² − v)             second moment
    ρ∞ ← 2/(1 − β₂) − 1
    ρₜ ← ρ∞ − 2t·β₂ᵗ/(1 − β₂ᵗ)             length of the average, in gradients
    r  ← √((ρₜ − 4)(ρₜ − 2)ρ∞/((ρ∞ − 4)(ρ∞ − 2)ρₜ))
    p  ← p − lr/(1 − β₁ᵗ) · r·√(1 − β₂ᵗ) · m/(√v + ε)  if ρₜ > 5
    p  ← p − lr/(1 − β₁ᵗ) · m                          else

Source: Liu et al. (2020), "On the Variance of the Adaptive Learning Rate and Beyond", Algorithm 2, with torch's 5 for
its 4. Weight decay is coupled (L2), or decoupled with ``decoupled_weight_decay``. Differs from torch.optim.RAdam by
rounding only: averages are written from the nearer end, decay and update are summed before the one rounding, and ρₜ,
where two numbers of size ρ∞ cancel, is computed as in `average_length`.
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

from ..arguments import check_beta_range, check_lr, check_nonnegative
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, sqrt_eager, sqrt_scalar

STATE = (Slot("exp_avg", "signed"), Slot("exp_avg_sq", "nonnegative"))


@triton.jit
def average_length(q, n):
    """ρₙ = 2c/b − 1 and b, where b = Σ q(1 − q)ⁱ⁻¹ = 1 − (1 − q)ⁿ and c = Σ i·q(1 − q)ⁱ⁻¹ over i ≤ n; nothing cancels.

    By doubling, as in `numerics.one_minus_power`: relative error 2e-15 for n ≤ 10⁵.
    """
    b, c, have = q * 0.0, q * 0.0, q * 0.0
    more_b, more_c, more = q, q, 1.0
    for i in tl.static_range(31):  # pyright: ignore[reportGeneralTypeIssues] # unrolled when compiled
        on = ((n >> i) & 1) != 0
        c = tl.where(on, c + (1.0 - b) * (have * more_b + more_c), c)
        b = tl.where(on, b + more_b * (1.0 - b), b)
        have = tl.where(on, have + more, have)
        more_c = more_c + (1.0 - more_b) * (more * more_b + more_c)
        more_b = more_b * (2.0 - more_b)
        more = more + more
    return 2.0 * c / b - 1.0, b


def average_length_eager(q: float, t: float) -> tuple[float, float]:
    """Eager twin of `average_length` (without the doublings that cannot matter)."""
    b, c, have, n = q * 0.0, q * 0.0, q * 0.0, int(t)
    more_b, more_c, more = q, q, 1.0
    while n:
        if n & 1:
            c = c + (1.0 - b) * (have * more_b + more_c)
            b = b + more_b * (1.0 - b)
            have = have + more
        more_c = more_c + (1.0 - more_b) * (more * more_b + more_c)
        more_b = more_b * (2.0 - more_b)
        more = more + more
        n >>= 1
    return 2.0 * c / b - 1.0, b


@triton.jit
def scalars(hyper, t):
    lr, _, beta1, beta2, eps = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t.to(tl.int64)
    step_size = lr / one_minus_power(q1, n)
    limit = 2.0 / q2 - 1.0
    length, correction = average_length(q2, n)
    rectified = length > 5.0
    bottom = tl.where(rectified, (limit - 4.0) * (limit - 2.0) * length, 1.0)
    top = (length - 4.0) * (length - 2.0) * limit
    factor = tl.sqrt(top / bottom) * tl.sqrt(correction)
    step_size = tl.where(rectified, step_size * factor, step_size)
    w1, w2 = average_weight(q1), average_weight(q2)
    return w1, w2, step_size, eps, tl.where(rectified, 1.0, lr * 0.0)


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, beta1, beta2, eps = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t
    step_size = lr / one_minus_power_eager(q1, n)
    limit = 2.0 / q2 - 1.0
    length, correction = average_length_eager(q2, n)
    rectified = length > 5.0
    bottom = (limit - 4.0) * (limit - 2.0) * length if rectified else 1.0
    top = (length - 4.0) * (length - 2.0) * limit
    factor = sqrt_scalar(top / bottom) * sqrt_scalar(correction)
    step_size = step_size * factor if rectified else step_size
    w1, w2 = average_weight_eager(q1), average_weight_eager(q2)
    return w1, w2, step_size, eps, 1.0 if rectified else 0.0


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w1, w2, step_size, eps, rectified = s
    m = average(state[0], g, w1)
    v = average(state[1], g * g, w2)
    root = tl.where(rectified != 0.0, sqrt(v, EXACT) + eps, 1.0)
    return step_size * div(m, root, EXACT), (m, v)


def update_eager(g, p, state, s, VARIANT):
    w1, w2, step_size, eps, rectified = s
    m = average_eager(state[0], g, w1)
    v = average_eager(state[1], g * g, w2)
    root = sqrt_eager(v) + eps if rectified != 0.0 else 1.0
    return step_size * div_eager(m, root), (m, v)


RULE = Rule(
    name="radam",
    hyper=("betas.0", "betas.1", "eps"),
    state=STATE,
    n_scalars=5,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
)


class RAdam(FusedOptimizer):
    """RAdam; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        betas: decay rates (β₁, β₂) of the moments, default (0.9, 0.999). eps: ε added to the root, default 1e-8.
        weight_decay: default 0, coupled. decoupled_weight_decay: p ← p − lr·weight_decay·p instead of L2.
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
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
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
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, foreach=foreach,
            capturable=capturable, decoupled_weight_decay=decoupled_weight_decay, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
