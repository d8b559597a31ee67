"""Schedule-free AdamW: schedule-free steps along gradients that are divided as Adam divides them.

    v ← v + (1 − β₂)·(g² − v)              second moment
    d ← g/(√v/√(1 − β₂ᵗ) + ε) + weight_decay·y
    γ, c, z, y as in ``schedule_free.py``, with β = β₁

Source: Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky (2024), "The Road Less Scheduled", Algorithm 1; arguments,
defaults, warmup, the weights in c, and the bias correction (of v, where the paper has it in γ) are those of its
authors' package schedulefree 1.4.1 (AdamWScheduleFree). Differs from that by rounding, in that gradients are not
overwritten, and in that t, Σw and the largest lr are counted for each parameter, on the device.
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
from ..options import Options
from ..rule import Rule, Slot
from ..schedule_free import SUMS, ScheduleFree, Z, move, move_eager, weights, weights_eager
from ..values import div_eager, sqrt_eager, sqrt_scalar

STATE = (Z, Slot("exp_avg_sq", "nonnegative"), *SUMS)


@triton.jit
def scalars(hyper, t, state):
    lr, weight_decay, beta1, beta2, eps, r, lr_power, warmup = hyper
    q2 = 1.0 - beta2
    n = t.to(tl.int64)
    correction = 1.0 / tl.sqrt(one_minus_power(q2, n))
    rate, c, pull, sums = weights(lr, beta1, r, lr_power, warmup, t, state)
    return (average_weight(q2), correction, eps, rate, c, pull, weight_decay), sums


def scalars_eager(hyper: tuple[float, ...], t: float, state: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    lr, weight_decay, beta1, beta2, eps, r, lr_power, warmup = hyper
    q2 = 1.0 - beta2
    n = t
    correction = 1.0 / sqrt_scalar(one_minus_power_eager(q2, n))
    rate, c, pull, sums = weights_eager(lr, beta1, r, lr_power, warmup, t, state)
    return (average_weight_eager(q2), correction, eps, rate, c, pull, weight_decay), sums


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w2, correction, eps, rate, c, pull, weight_decay = s
    v = average(state[1], g * g, w2)
    d = div(g, sqrt(v, EXACT) * correction + eps, EXACT)
    d = tl.where(weight_decay != 0.0, d + weight_decay * p, d)
    descent, z = move(p, state[0], d, rate, c, pull)
    return descent, (z, v)


def update_eager(g, p, state, s, VARIANT):
    w2, correction, eps, rate, c, pull, weight_decay = s
    v = average_eager(state[1], g * g, w2)
    d = div_eager(g, sqrt_eager(v) * correction + eps)
    d = d + weight_decay * p if weight_decay != 0.0 else d
    descent, z = move_eager(p, state[0], d, rate, c, pull)
    return descent, (z, v)


RULE = Rule(
    name="schedule_free_adamw",
    hyper=("betas.0", "betas.1", "eps", "r", "weight_lr_power", "warmup_steps"),
    state=STATE,
    n_scalars=7,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    decay="own",
    cautious=False,
)


class AdamWScheduleFree(ScheduleFree):
    """Schedule-free AdamW; the maths stand at the top of this file.

    Call `train` before training and `eval` before evaluating; checkpoints keep which of them was last.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor, without a schedule; default 0.0025.
        betas: β₁, where gradients are taken between z and x, and β₂ of the second moment; default (0.9, 0.999).
        eps: ε added to the root, default 1e-8. weight_decay: default 0, at y.
        warmup_steps: steps of linear warmup, default 0.
        r: power of t in the weights of the average, default 0.
        weight_lr_power: power of the largest lr so far in them, default 2.
        foreach: checked as torch does, then selects nothing. maximize: ascend.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, eps, weight_decay or warmup_steps, a beta outside [0, 1), a β₁ of 0.
    """

    rule = RULE
    _beta = "betas.0"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_beta_range(betas)
        if not betas[0] > 0.0:
            raise ValueError(f"Invalid beta parameter at index 0: {betas[0]}; it must lie in (0, 1)")
        for name, value in dict(epsilon=eps, weight_decay=weight_decay, warmup_steps=warmup_steps).items():
            check_nonnegative(name, value)
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, warmup_steps=warmup_steps, r=r,
            weight_lr_power=weight_lr_power, train_mode=True, foreach=foreach, maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
