"""Oracle of LARS.

You, Gitman, Ginsburg (2017), "Large Batch Training of Convolutional Networks", Algorithm 1 with the local rate of
eq. 6: the learning rate enters the buffer, λˡ uses the norm of the gradient without its decay. Where a norm is zero
the local rate is 1, as in the authors' code. Not in the paper: ε in the denominator, Nesterov's look-ahead, which
applies the momentum once more, and dampening, which as in torch.optim.SGD leaves the first step alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import Bound
from ..oracle import Configuration, Oracle, Value, coupled_gradient, largest, norm


def local_rate(h: Mapping[str, Any], p: np.ndarray, g: np.ndarray) -> np.floating:
    """λˡ = η·‖w‖/(‖∇L‖ + β·‖w‖ + ε)."""
    real = p.dtype.type
    p_norm, g_norm = norm(p), norm(g)
    if p_norm == 0 or g_norm == 0:
        return real(1)
    return real(h["trust_coefficient"]) * p_norm / (g_norm + real(h["weight_decay"]) * p_norm + real(h["eps"]))


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """v ← m·v + (1 − τ)·γ·λˡ·(∇L + β·w);  w ← w − v, or w − (γ·λˡ·(∇L + β·w) + m·v) with Nesterov."""
    real = p.dtype.type
    mu, rate = real(h["momentum"]), real(h["lr"]) * local_rate(h, p, g)
    gradient = coupled_gradient(h, p, g)
    move = Value(rate * gradient.exact, rate * gradient.addend)
    new: dict[str, Value] = {}
    if mu != 0:
        old = mu * state.get("momentum_buffer", np.zeros_like(p))
        take = real(1) - real(h["dampening"]) if "momentum_buffer" in state else real(1)
        new["momentum_buffer"] = v = Value(old + take * move.exact, largest(old, take * move.addend))
        ahead = Value(move.exact + mu * v.exact, largest(move.exact + mu * v.exact, move.addend, mu * v.addend))
        move = ahead if h["nesterov"] else v
    new["param"] = Value(p - move.exact, largest(p, move.exact, move.addend))
    return new


NORMS_64 = 66.0
"""float64 only: sums of squares are trees at most 64 deep, which is 33 u in each of the two roots."""

PLAIN_STEP = Bound(
    18.0,
    "p − lr·λˡ·(g + β·p). In λˡ: η, ‖p‖ and their product 3; ‖g‖ + β·‖p‖ + ε at most 3 in a term and two sums, 5; "
    "division 1. lr and two products 3; g + β·p 3; the last sum 1. Together 16, or 18 with lr·η·‖p‖ in another order.",
    extra64=NORMS_64,
)
BUFFER = Bound(
    22.0,
    "m·v + lr·λˡ·(g + β·p): m and its product 2; as the plain step 17; 1 − τ and its product 2; the sum 1.",
    extra64=NORMS_64,
)
BUFFER_STEP = Bound(24.0, "p − v: the buffer's 22, its sum as an addend 1; the last sum 1.", extra64=NORMS_64)
NESTEROV_STEP = Bound(
    45.0,
    "p − (lr·λˡ·(g + β·p) + m·v): 17 as in the plain step; the buffer's 22 and 1, m and its product 2; two sums 2.",
    extra64=2 * NORMS_64,
)

ORACLE = Oracle(
    rule="lars",
    defaults=dict(
        lr=1.0,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        trust_coefficient=0.001,
        eps=1e-8,
        maximize=False,
    ),
    step=step,
    configurations=(
        Configuration("lars", "plain"),
        Configuration("lars", "momentum", dict(momentum=0.9)),
        Configuration("lars", "dampening", dict(momentum=0.9, dampening=0.3, weight_decay=1e-4)),
        Configuration("lars", "nesterov", dict(lr=10.0, momentum=0.9, nesterov=True, weight_decay=1e-4)),
    ),
    bounds={
        "plain": {"param": PLAIN_STEP},
        "momentum": {"momentum_buffer": BUFFER, "param": BUFFER_STEP},
        "dampening": {"momentum_buffer": BUFFER, "param": BUFFER_STEP},
        "nesterov": {"momentum_buffer": BUFFER, "param": NESTEROV_STEP},
    },
)
