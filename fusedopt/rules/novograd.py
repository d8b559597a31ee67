"""NovoGrad: momentum on gradients that are divided by a running norm of their parameter's gradient.

    v ← ‖g‖²                               while v is 0, else
    v ← v + (1 − β₂)·(‖g‖² − v)            second moment, one number for each parameter
    d ← g/(√v + ε) + weight_decay·p         (times 1 − β₁ if grad_averaging)
    m ← β₁·m + d                           first moment
    p ← p − lr·m

Source: Ginsburg, Castonguay, Hrinchuk, Kuchaiev, Lavrukhin, Leary, Li, Nguyen, Zhang, Cohen (2019), "Training Deep
Networks with Stochastic Gradient Normalized by Layerwise Adaptive Second Moments", Algorithm 1, each parameter tensor
being a layer. ε on the first step and the start at the first gradient that is not zero are the authors' code's; the
default β₂ = 0.98 is the paper's, where that code has 0; its AMSGrad is left out. √v + ε enters as a reciprocal.
"""

from collections.abc import Iterable
from math import inf
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from fusedopt_kernels.numerics import average, average_eager, average_weight, average_weight_eager

from ..arguments import check_beta_range, check_lr, check_nonnegative
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import sqrt_scalar

STATE = (Slot("exp_avg", "signed"), Slot("exp_avg_sq", "scalar", wide=True))


@triton.jit
def scalars(hyper, t, state, norm):
    lr, weight_decay, beta1, beta2, eps, averaging = hyper
    square = norm * norm
    v = tl.where(state[0] == 0.0, square, average(state[0], square, average_weight(1.0 - beta2)))
    take = 1.0 - averaging * beta1
    scale = take / (tl.sqrt(v) + eps)
    return (lr, beta1, scale, take * weight_decay), (v,)


def scalars_eager(hyper: tuple[float, ...], t: float, state: tuple[float, ...], norm: float) -> Any:
    lr, weight_decay, beta1, beta2, eps, averaging = hyper
    square = norm * norm
    v = square if state[0] == 0.0 else average_eager(state[0], square, average_weight_eager(1.0 - beta2))
    take = 1.0 - averaging * beta1
    scale = take / below if (below := sqrt_scalar(v) + eps) else inf
    return (lr, beta1, scale, take * weight_decay), (v,)


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    lr, beta1, scale, decay = s
    d = scale * g
    d = tl.where(decay != 0.0, d + decay * p, d)
    m = beta1 * state[0] + d
    return lr * m, (m,)


def update_eager(g, p, state, s, VARIANT):
    lr, beta1, scale, decay = s
    d = scale * g
    d = d + decay * p if decay != 0.0 else d
    m = beta1 * state[0] + d
    return lr * m, (m,)


RULE = Rule(
    name="novograd",
    hyper=("betas.0", "betas.1", "eps", "grad_averaging"),
    state=STATE,
    n_scalars=4,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    decay="own",
    grad_norm=True,
)


class NovoGrad(FusedOptimizer):
    """NovoGrad; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        betas: decay rates (β₁, β₂) of the moments, default (0.95, 0.98). eps: ε added to the norm, default 1e-8.
        weight_decay: enters the first moment, default 0.
        grad_averaging: make the first moment an average, default False.
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
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_averaging: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_beta_range(betas)
        check_nonnegative("epsilon", eps)
        check_nonnegative("weight_decay", weight_decay)
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, grad_averaging=grad_averaging, maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
