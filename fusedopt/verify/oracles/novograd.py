"""Oracle of NovoGrad.

Ginsburg, Castonguay, Hrinchuk, Kuchaiev, Lavrukhin, Leary, Li, Nguyen, Zhang, Cohen (2019), "Training Deep Networks
with Stochastic Gradient Normalized by Layerwise Adaptive Second Moments", Algorithm 1: v is one number for each layer,
and the first gradient fills both moments. As in the authors' code the first one that is not zero fills v, with
``grad_averaging`` 1 − β₁ weighs what enters m (also on the first step).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import SCALAR_SLOT, Bound
from ..oracle import Configuration, Oracle, Value, coupled_gradient, largest, norm, number


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """v ← β₂·v + (1 − β₂)·‖g‖²;  m ← β₁·m + (g/(√v + ε) + d·w);  w ← w − λ·m.

    v is kept in float64 but follows from a norm that is rounded to the gradient's type, so it is judged as fp32.
    """
    real = p.dtype.type
    beta1, beta2 = (np.longdouble(beta) for beta in h["betas"])
    v = norm(g) ** 2
    if state.get("exp_avg_sq", 0) > 0:
        v = real(beta2) * state["exp_avg_sq"] + real(1 - beta2) * v
    enter = real(1 - beta1) if h["grad_averaging"] else real(1)
    scale = enter / (np.sqrt(v) + real(h["eps"]))
    gradient = coupled_gradient({**h, "weight_decay": 0.0}, p, g).exact * scale
    decay = enter * real(h["weight_decay"]) * p
    old = real(beta1) * state.get("exp_avg", np.zeros_like(p))
    m = Value(old + gradient + decay, largest(old, gradient, decay, gradient + decay))
    moved = real(h["lr"]) * m.exact
    new = Value(p - moved, largest(p, moved, real(h["lr"]) * m.addend))
    return {"param": new, "exp_avg": m, "exp_avg_sq": number(v, real)}


NORM_64 = 34.0
"""float64 only: the sum of squares is a tree at most 64 deep, 33 u in the root; √v itself 1."""

MOMENT = Bound(
    11.0,
    "β₁·m + (g/(√v + ε) + d·w): √v + ε rounded from float64 and the division 2, or the reciprocal and a product 2; d "
    "and its product 2; their sum 1; β₁ and its product 2; the sum 1. Together 8; written as m + (1−β₁)(x − m), with "
    "averaging: 10/9 of constant, difference and product 3.4, 5 in x, the sum 1.",
    extra64=NORM_64,
)
STEP = Bound(15.0, "p − λ·m: the moment's 11, its sum as an addend 1; λ and its product 2; the sum 1.", NORM_64)

VALUES = {"exp_avg": MOMENT, "exp_avg_sq": SCALAR_SLOT, "param": STEP}

ORACLE = Oracle(
    rule="novograd",
    defaults=dict(lr=1e-3, betas=(0.95, 0.98), eps=1e-8, weight_decay=0.0, grad_averaging=False, maximize=False),
    step=step,
    configurations=(
        Configuration("novograd", "plain", dict(lr=0.1)),
        Configuration("novograd", "weight decay", dict(lr=0.1, weight_decay=0.01)),
        Configuration("novograd", "averaging", dict(lr=0.1, weight_decay=0.01, grad_averaging=True)),
    ),
    bounds=dict.fromkeys(("plain", "weight decay", "averaging"), VALUES),
    scalars=("exp_avg_sq",),
)
