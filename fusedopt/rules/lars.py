"""LARS: momentum SGD whose rate in each parameter follows the ratio of its norm to its gradient's.

    λ ← η·‖p‖/(‖g‖ + weight_decay·‖p‖ + ε)   local rate; 1 where ‖p‖ or ‖g‖ is 0
    d ← lr·λ·(g + weight_decay·p)
    b ← μ·b + d                            momentum buffer (with dampening τ: + (1 − τ)·d, but not on the first step)
    d ← d + μ·b   if nesterov, else b       (d stays without momentum)
    p ← p − d

Source: You, Gitman, Ginsburg (2017), "Large Batch Training of Convolutional Networks", eq. 6 and Algorithm 1, each
parameter tensor being a layer; η is `trust_coefficient`. As there, and other than in SGD here, lr multiplies each
gradient on its way into the buffer. ε, dampening, Nesterov's look-ahead and the rate at norms of zero are not in the
paper; they are those of the common PyTorch versions. ‖p‖ and ‖g‖ are measured in a first pass.
"""

from collections.abc import Iterable
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from fusedopt_kernels.numerics import div

from ..arguments import check_lr, check_nonnegative
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager

STATE = (Slot("momentum_buffer", "signed", when="momentum"),)


@triton.jit
def scalars(hyper, t):
    lr, weight_decay, mu, dampening, trust, eps = hyper
    take = tl.where(t <= 1.0, 1.0, 1.0 - dampening)
    return lr, weight_decay, mu, take, trust, eps


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, weight_decay, mu, dampening, trust, eps = hyper
    take = 1.0 if t <= 1.0 else 1.0 - dampening
    return lr, weight_decay, mu, take, trust, eps


@triton.jit
def measure(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    return p, g


def measure_eager(g, p, state, s, VARIANT):
    return p, g


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    lr, weight_decay, mu, take, trust, eps, p_norm, g_norm, _ = s
    some = (p_norm > 0.0) & (g_norm > 0.0)
    below = tl.where(some, g_norm + weight_decay * p_norm + eps, 1.0)
    rate = lr * tl.where(some, div(trust * p_norm, below, EXACT), 1.0)
    d = rate * tl.where(weight_decay != 0.0, g + weight_decay * p, g)
    if VARIANT[0]:
        b = mu * state[0] + take * d
        d = d + mu * b if VARIANT[1] else b
        state = (b,)
    return d, state


def update_eager(g, p, state, s, VARIANT):
    lr, weight_decay, mu, take, trust, eps, p_norm, g_norm, _ = s
    some = p_norm > 0.0 and g_norm > 0.0
    below = g_norm + weight_decay * p_norm + eps
    rate = lr * (div_eager(trust * p_norm, below) if some else 1.0)
    d = rate * (g + weight_decay * p if weight_decay != 0.0 else g)
    if VARIANT[0]:
        b = mu * state[0] + take * d
        d = d + mu * b if VARIANT[1] else b
        state = (b,)
    return d, state


RULE = Rule(
    name="lars",
    hyper=("momentum", "dampening", "trust_coefficient", "eps"),
    state=STATE,
    n_scalars=6,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    structure=("momentum", "nesterov"),
    decay="own",
    counts_in_state=False,
    n_norms=2,
    measure=measure,
    measure_eager=measure_eager,
)


class LARS(FusedOptimizer):
    """LARS; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them. Biases and normalisation weights
            usually go into a group of SGD's own.
        lr: learning rate per step, float or one-element tensor; default 1.
        momentum: μ, default 0. dampening: τ, default 0. weight_decay: default 0.
        nesterov: needs momentum > 0 and dampening 0.
        trust_coefficient: η, default 0.001. eps: ε in the denominator of λ, default 1e-8.
        maximize: ascend.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative number; nesterov without momentum or with dampening.
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr)
        for name, value in dict(momentum=momentum, weight_decay=weight_decay, epsilon=eps).items():
            check_nonnegative(name, value)
        check_nonnegative("trust_coefficient", trust_coefficient)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            trust_coefficient=trust_coefficient, eps=eps, maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, **options)
