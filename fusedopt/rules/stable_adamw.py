"""StableAdamW: AdamW whose rate shrinks in each parameter while the gradient outruns its second moment.

    m ← m + (1 − β₁)/(1 − β₁ᵗ)·(g − m)     first moment, its β corrected
    v ← v + (1 − β₂)/(1 − β₂ᵗ)·(g² − v)    second moment, likewise
    RMS ← √(mean of g²/max(v, ε²))         over the parameter
    η ← lr/max(1, RMS)
    p ← p − η·(m/(√v + ε) + weight_decay·p)

Source: Wortsman, Dettmers, Zettlemoyer, Morcos, Farhadi, Schmidt (2023), "Stable and low-precision training for
large-scale vision-language models", Algorithm 2, with v held above ε² in RMS as its text advises; the weight there is
1 − β·(1 − βᵗ⁻¹)/(1 − βᵗ), which is the same. RMS is measured in a first pass, as the norm of g/max(√v, ε).
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

from ..arguments import check_beta_range, check_lr, check_nonnegative
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, maximum_eager, sqrt_eager

STATE = (Slot("exp_avg", "signed"), Slot("exp_avg_sq", "nonnegative"))


@triton.jit
def scalars(hyper, t):
    lr, weight_decay, beta1, beta2, eps = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t.to(tl.int64)
    w1 = average_weight(q1 / one_minus_power(q1, n))
    w2 = average_weight(q2 / one_minus_power(q2, n))
    return w1, w2, eps, lr, weight_decay


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, weight_decay, beta1, beta2, eps = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t
    w1 = average_weight_eager(q1 / one_minus_power_eager(q1, n))
    w2 = average_weight_eager(q2 / one_minus_power_eager(q2, n))
    return w1, w2, eps, lr, weight_decay


@triton.jit
def measure(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    v = average(state[1], g * g, s[1])
    return (div(g, maximum(sqrt(v, EXACT), s[2]), EXACT),)


def measure_eager(g, p, state, s, VARIANT):
    v = average_eager(state[1], g * g, s[1])
    return (div_eager(g, maximum_eager(sqrt_eager(v), s[2])),)


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w1, w2, eps, lr, weight_decay, norm, n = s
    m = average(state[0], g, w1)
    v = average(state[1], g * g, w2)
    rms = div(norm, sqrt(n, EXACT), EXACT)
    rate = tl.where(rms > 1.0, div(lr, tl.where(rms > 1.0, rms, 1.0), EXACT), lr)
    decay = rate * weight_decay
    descent = rate * div(m, sqrt(v, EXACT) + eps, EXACT)
    return tl.where(decay != 0.0, descent + decay * p, descent), (m, v)


def update_eager(g, p, state, s, VARIANT):
    w1, w2, eps, lr, weight_decay, norm, n = s
    m = average_eager(state[0], g, w1)
    v = average_eager(state[1], g * g, w2)
    rms = div_eager(norm, sqrt_eager(n))
    rate = div_eager(lr, rms) if rms > 1.0 else lr
    decay = rate * weight_decay
    descent = rate * div_eager(m, sqrt_eager(v) + eps)
    return descent + decay * p if decay != 0.0 else descent, (m, v)


RULE = Rule(
    name="stable_adamw",
    hyper=("betas.0", "betas.1", "eps"),
    state=STATE,
    n_scalars=5,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    decay="own",
    n_norms=1,
    measure=measure,
    measure_eager=measure_eager,
)


class StableAdamW(FusedOptimizer):
    """StableAdamW; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        betas: decay rates (β₁, β₂) of the moments, default (0.9, 0.99). eps: ε added to the root, default 1e-8.
        weight_decay: decoupled, with the rate that is left; default 0.01.
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
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_beta_range(betas)
        check_nonnegative("epsilon", eps)
        check_nonnegative("weight_decay", weight_decay)
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, defaults, **options)
