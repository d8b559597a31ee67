"""ASGD: stochastic gradient descent with an average of the parameter.

    p  ← p − (η·g + λ·η·p)
    ax ← ax + μ·(p − ax)                   average of p; ax ← p as long as μ = 1
    η  ← lr/(1 + λ·lr·t)^α                 for the next step; begins as lr
    μ  ← 1/max(1, t − t₀)                  for the next step; begins as 1

Source: Polyak & Juditsky (1992), "Acceleration of Stochastic Approximation by Averaging", with the step sizes of
Bottou (2012), "Stochastic Gradient Descent Tricks", section 5, and torch.optim.ASGD's exponent α. Weight decay is
coupled (L2), beside λ. Differs from torch by rounding only: decay and update are summed before the one rounding, and
ax follows p before it is rounded to its storage.
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
    power,
    power_eager,
)  # fmt: skip

from ..arguments import check_lr, check_nonnegative, check_number
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot

STATE = (Slot("ax", "weight"), Slot("eta", "scalar", "lr"), Slot("mu", "scalar", 1.0))


@triton.jit
def scalars(hyper, t, state):
    lr, _, lambd, alpha, t0 = hyper
    eta, mu = state
    decay = lambd * eta
    w = average_weight(mu)
    eta_next = lr * power(1.0 + lambd * lr * t, 0.0 - alpha)
    mu_next = 1.0 / tl.maximum(t - t0, 1.0)
    return (eta, decay, w), (eta_next, mu_next)


def scalars_eager(hyper: tuple[float, ...], t: float, state: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    lr, _, lambd, alpha, t0 = hyper
    eta, mu = state
    decay = lambd * eta
    w = average_weight_eager(mu)
    eta_next = lr * power_eager(1.0 + lambd * lr * t, 0.0 - alpha)
    mu_next = 1.0 / max(t - t0, 1.0)
    return (eta, decay, w), (eta_next, mu_next)


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    eta, decay, w = s
    descent = tl.where(decay != 0.0, eta * g + decay * p, eta * g)  # 0·inf would be NaN
    x = p - descent
    return descent, (tl.where(w == 0.0, x, average(state[0], x, w)),)


def update_eager(g, p, state, s, VARIANT):
    eta, decay, w = s
    descent = eta * g + decay * p if decay != 0.0 else eta * g  # 0·inf would be NaN
    x = p - descent
    return descent, (x if w == 0.0 else average_eager(state[0], x, w),)


RULE = Rule(
    name="asgd",
    hyper=("lambd", "alpha", "t0"),
    state=STATE,
    n_scalars=3,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    cautious=False,
)


class ASGD(FusedOptimizer):
    """Averaged SGD; the maths stand at the top of this file. The average is ``state[p]["ax"]``.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate of the first step, float or one-element tensor; default 1e-2.
        lambd: λ, decay of p and of the step size, default 1e-4. alpha: α, power of the step size's decay, default 0.75.
        t0: step from which on ax averages, default 1e6. weight_decay: L2 coefficient, default 0.
        maximize: ascend. foreach, capturable: checked as torch does, then select nothing (every step is capturable).
        differentiable: refused when True.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr or weight_decay.
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_nonnegative("weight_decay", weight_decay)
        for name, value in (("lambd", lambd), ("alpha", alpha), ("t0", t0)):
            check_number(name, value)
        defaults = dict(
            lr=lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay, foreach=foreach, maximize=maximize,
            differentiable=differentiable, capturable=capturable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
