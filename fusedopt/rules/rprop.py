"""Rprop: a step size for each element, grown while its gradient keeps its sign and cut when that changes.

    c ← sign(g)·sign(g′)                   g′ the gradient before this one
    δ ← min(max(δ·(η⁺ if c > 0, η⁻ if c < 0, else 1), δ_min), δ_max)    step size, begins as lr
    g ← 0  if c < 0
    p ← p − δ·sign(g)
    g′ ← g

Source: Riedmiller & Braun (1993), "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm",
in the form of torch.optim.Rprop, which takes no step back after a change of sign: Igel & Hüsken (2000), "Improving the
Rprop Learning Algorithm", iRprop⁻. Same results as torch's, but for gradients whose product g·g′ underflows: it has no
sign there, here it has.
"""

from collections.abc import Iterable
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from fusedopt_kernels.numerics import sign

from ..arguments import check_lr, check_pair
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import where_eager

STATE = (Slot("prev", "signed"), Slot("step_size", "nonnegative", "lr"))


@triton.jit
def scalars(hyper, t):
    _, _, minus, plus, low, high = hyper
    return minus, plus, low, high


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    _, _, minus, plus, low, high = hyper
    return minus, plus, low, high


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    minus, plus, low, high = s
    c = sign(g) * sign(state[0])
    size = state[1] * tl.where(c > 0.0, plus, tl.where(c < 0.0, minus, 1.0))
    size = tl.where(size < low, low, size)
    size = tl.where(size > high, high, size)
    g = tl.where(c < 0.0, 0.0, g)
    return size * sign(g), (g, size)


def update_eager(g, p, state, s, VARIANT):
    minus, plus, low, high = s
    c = g.sign() * state[0].sign()
    size = state[1] * where_eager(c > 0.0, plus, where_eager(c < 0.0, minus, 1.0))
    size = where_eager(size < low, low, size)
    size = where_eager(size > high, high, size)
    g = where_eager(c < 0.0, 0.0, g)
    return size * g.sign(), (g, size)


RULE = Rule(
    name="rprop",
    hyper=("etas.0", "etas.1", "step_sizes.0", "step_sizes.1"),
    state=STATE,
    n_scalars=4,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    cautious=False,
)


class Rprop(FusedOptimizer):
    """Rprop; the maths stand at the top of this file. For gradients of the whole data set.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: first step size of every element, float or one-element tensor; default 1e-2. Later changes have no effect.
        etas: factors (η⁻, η⁺) of the step size, η⁻ < 1 < η⁺, default (0.5, 1.2).
        step_sizes: smallest and largest step size, default (1e-6, 50).
        maximize: ascend. foreach, capturable: checked as torch does, then select nothing (every step is capturable).
        differentiable: refused when True.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, etas that do not hold 0 < η⁻ < 1 < η⁺.
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        check_pair("etas", etas, ("etaminus", "etaplus"))
        if not 0.0 < etas[0] < 1.0 < etas[1]:
            raise ValueError(f"Invalid eta values: {etas[0]}, {etas[1]}; they must hold 0 < etaminus < 1 < etaplus")
        check_pair("step_sizes", step_sizes, ("smallest", "largest"))
        defaults = dict(
            lr=lr, etas=etas, step_sizes=step_sizes, foreach=foreach, maximize=maximize,
            differentiable=differentiable, capturable=capturable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
