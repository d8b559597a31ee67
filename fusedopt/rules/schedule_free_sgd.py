"""Schedule-free SGD: SGD at a point between its own iterate and the average of all of them.

    d ← g + weight_decay·y
    γ, c, z, y as in ``schedule_free.py``, with β = momentum

Source: Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky (2024), "The Road Less Scheduled", eqs. 2–4; arguments,
defaults, warmup and the weights in c are those of its authors' package schedulefree 1.4.1 (SGDScheduleFree). Differs
from that by rounding, in that gradients are not overwritten, and in that t, Σw and the largest lr are counted for each
parameter, on the device.
"""

from collections.abc import Iterable
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from ..arguments import check_lr, check_nonnegative
from ..options import Options
from ..rule import Rule
from ..schedule_free import SUMS, ScheduleFree, Z, move, move_eager, weights, weights_eager

STATE = (Z, *SUMS)


@triton.jit
def scalars(hyper, t, state):
    lr, weight_decay, beta, r, lr_power, warmup = hyper
    rate, c, pull, sums = weights(lr, beta, r, lr_power, warmup, t, state)
    return (rate, c, pull, weight_decay), sums


def scalars_eager(hyper: tuple[float, ...], t: float, state: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    lr, weight_decay, beta, r, lr_power, warmup = hyper
    rate, c, pull, sums = weights_eager(lr, beta, r, lr_power, warmup, t, state)
    return (rate, c, pull, weight_decay), sums


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    rate, c, pull, weight_decay = s
    d = tl.where(weight_decay != 0.0, g + weight_decay * p, g)
    descent, z = move(p, state[0], d, rate, c, pull)
    return descent, (z,)


def update_eager(g, p, state, s, VARIANT):
    rate, c, pull, weight_decay = s
    d = g + weight_decay * p if weight_decay != 0.0 else g
    descent, z = move_eager(p, state[0], d, rate, c, pull)
    return descent, (z,)


RULE = Rule(
    name="schedule_free_sgd",
    hyper=("momentum", "r", "weight_lr_power", "warmup_steps"),
    state=STATE,
    n_scalars=4,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    decay="own",
    cautious=False,
)


class SGDScheduleFree(ScheduleFree):
    """Schedule-free SGD; the maths stand at the top of this file.

    Call `train` before training and `eval` before evaluating; checkpoints keep which of them was last.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor, without a schedule; default 1.
        momentum: β, where gradients are taken between z and x, default 0.9. weight_decay: default 0, at y.
        warmup_steps: steps of linear warmup, default 0.
        r: power of t in the weights of the average, default 0.
        weight_lr_power: power of the largest lr so far in them, default 2.
        foreach: checked as torch does, then selects nothing. maximize: ascend.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, weight_decay or warmup_steps, a momentum outside (0, 1).
    """

    rule = RULE
    _beta = "momentum"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1.0,
        momentum: float = 0.9,
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
        check_nonnegative("weight_decay", weight_decay)
        check_nonnegative("warmup_steps", warmup_steps)
        if not 0.0 < momentum < 1.0:
            raise ValueError(f"Invalid momentum value: {momentum}; it must lie in (0, 1)")
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, warmup_steps=warmup_steps, r=r,
            weight_lr_power=weight_lr_power, train_mode=True, foreach=foreach, maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
