"""Oracle of Adamax.

Kingma & Ba (2015), "Adam: A Method for Stochastic Optimization", Algorithm 2, with torch.optim.Adamax's ε, which is
added to |g| inside the maximum. Weight decay is the L2 term in the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import L2_MOMENT, MOMENT, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, debias, largest, share


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """m ← β₁·m + (1 − β₁)·g;  u ← max(β₂·u, |g| + ε);  p ← p − lr/(1 − β₁ᵗ)·m/u."""
    real, zeros = p.dtype.type, np.zeros_like(p)
    beta1, beta2 = h["betas"]
    eps = real(h["eps"])
    gradient = coupled_gradient(h, p, g)
    m = average(beta1, state.get("exp_avg", zeros), gradient)
    decayed = real(beta2) * state.get("exp_inf", zeros)
    u = Value(np.maximum(decayed, np.abs(gradient.exact) + eps), largest(decayed, gradient.addend, eps))
    scale = real(h["lr"]) / debias(beta1, t, real) / u.exact
    delta = scale * m.exact
    addend = largest(p, delta, scale * m.addend, delta * share(u))
    return {"param": Value(p - delta, addend), "exp_avg": m, "exp_inf": u}


LARGEST = Bound(2.0, "β₂·u: constant and product 2. |g| + ε: the constant 1, the sum, of at most 2S, 1.")
STEP = Bound(
    10.4,
    "A·m/u: in m 3.34 as for exp_avg, and its sum's u; 2 in u; division 1; A and its product 2; the last sum 1.",
    extra64=2.7,  # 1 − βᵗ by repeated squaring errs by 3e-16 in float64
)
L2_LARGEST = Bound(5.0, "As exp_inf, 2; g + λ·p adds constant, product and sum.")
L2_STEP = Bound(16.4, "As the step, 10.4; g + λ·p adds 3 through m and 3 through u.", extra64=2.7)

ORACLE = Oracle(
    rule="adamax",
    defaults=dict(lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False),
    step=step,
    configurations=(
        Configuration("adamax", "plain"),
        Configuration("adamax", "weight decay", dict(weight_decay=0.01, maximize=True)),
    ),
    bounds={
        "plain": {"exp_avg": MOMENT, "exp_inf": LARGEST, "param": STEP},
        "weight decay": {"exp_avg": L2_MOMENT, "exp_inf": L2_LARGEST, "param": L2_STEP},
    },
)
