"""AdaBelief: Adam whose second moment measures how far gradients lie from their own average.

    m ← m + (1 − β₁)·(g − m)                  first moment
    s ← s + (1 − β₂)·((g − m)² − s) + ε        variance around it
    p ← p − lr·weight_decay·p − lr/(1 − β₁ᵗ) · m / (√s/√(1 − β₂ᵗ) + ε)

Source: Zhuang, Tang, Ding, Tatikonda, Dvornek, Papademetris, Duncan (2020), "AdaBelief Optimizer: Adapting Stepsizes
by the Belief in Observed Gradients", Algorithm 2, with decoupled weight decay as its authors recommend and without the
rectification that their package adds (RAdam has it).
"""

from collections.abc import Iterable
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from fusedopt_kernels.numerics import average, average_eager, div, sqrt

from ..arguments import check_betas, check_lr, check_nonnegative
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, sqrt_eager
from .adam import scalars, scalars_eager

STATE = (Slot("exp_avg", "signed"), Slot("exp_avg_var", "nonnegative"))


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w1, w2, step_size, correction, eps = s
    m = average(state[0], g, w1)
    d = g - m
    v = average(state[1], d * d, w2) + eps
    return step_size * div(m, sqrt(v, EXACT) * correction + eps, EXACT), (m, v)


def update_eager(g, p, state, s, VARIANT):
    w1, w2, step_size, correction, eps = s
    m = average_eager(state[0], g, w1)
    d = g - m
    v = average_eager(state[1], d * d, w2) + eps
    return step_size * div_eager(m, sqrt_eager(v) * correction + eps), (m, v)


RULE = Rule(
    name="adabelief",
    hyper=("betas.0", "betas.1", "eps"),
    state=STATE,
    n_scalars=5,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    decay="decoupled",
)


class AdaBelief(FusedOptimizer):
    """AdaBelief; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        betas: decay rates (β₁, β₂) of the averages, floats or one-element tensors, default (0.9, 0.999).
        eps: ε, added to the variance at every step and to its root, default 1e-16 (1e-8 behaves like Adam).
        weight_decay: decoupled, multiplied by lr; default 0. maximize: ascend.
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
        eps: float = 1e-16,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_nonnegative("epsilon", eps)
        betas = check_betas(betas, None, True)
        check_nonnegative("weight_decay", weight_decay)
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize), **options
        )
