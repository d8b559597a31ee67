"""Lion: the sign of one average of the gradients moves the parameter, another average is kept.

    c ← m + (1 − β₁)·(g − m)
    p ← p − lr·(sign(c) + weight_decay·p)
    m ← m + (1 − β₂)·(g − m)

Source: Chen, Liang, Huang, Real, Wang, Pham, Dong, Luong, Hsieh, Lu, Le (2023), "Symbolic Discovery of Optimization
Algorithms", Algorithm 2. Weight decay is decoupled and takes lr, as there. Where c is zero the step is only decay.
"""

from collections.abc import Iterable
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from fusedopt_kernels.numerics import average, average_eager, average_weight, average_weight_eager, sign

from ..arguments import check_beta_range, check_lr, check_nonnegative
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot

STATE = (Slot("exp_avg", "signed"),)


@triton.jit
def scalars(hyper, t):
    lr, _, beta1, beta2 = hyper
    return average_weight(1.0 - beta1), average_weight(1.0 - beta2), lr


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, beta1, beta2 = hyper
    return average_weight_eager(1.0 - beta1), average_weight_eager(1.0 - beta2), lr


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w1, w2, lr = s
    c = average(state[0], g, w1)
    m = average(state[0], g, w2)
    return lr * sign(c), (m,)


def update_eager(g, p, state, s, VARIANT):
    w1, w2, lr = s
    c = average_eager(state[0], g, w1)
    m = average_eager(state[0], g, w2)
    return lr * c.sign(), (m,)


RULE = Rule(
    name="lion",
    hyper=("betas.0", "betas.1"),
    state=STATE,
    n_scalars=3,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    decay="decoupled",
    counts_in_state=False,
)


class Lion(FusedOptimizer):
    """Lion; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-4, a third to a tenth of AdamW's.
        betas: β₁ of the direction and β₂ of the average that is kept, default (0.9, 0.99).
        weight_decay: default 0, decoupled; three to ten times AdamW's.
        maximize: ascend.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr or weight_decay, a beta outside [0, 1).
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_beta_range(betas)
        check_nonnegative("weight_decay", weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize), **options)
