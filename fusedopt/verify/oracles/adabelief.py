"""Oracle of AdaBelief.

Zhuang, Tang, Ding, Tatikonda, Dvornek, Papademetris, Duncan (2020), "AdaBelief Optimizer: Adapting Stepsizes by the
Belief in Observed Gradients", Algorithm 2 without projection; decoupled weight decay λ·lr·θ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import BIAS_64, MOMENT, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, debias, largest, share, square


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """m ← β₁·m + (1 − β₁)·g;  s ← β₂·s + (1 − β₂)·(g − m)² + ε;  θ ← θ − α·m̂/(√ŝ + ε) − α·λ·θ."""
    real, zeros = p.dtype.type, np.zeros_like(p)
    beta1, beta2 = h["betas"]
    lr, eps = real(h["lr"]), real(h["eps"])
    gradient = coupled_gradient({**h, "weight_decay": 0.0}, p, g)
    m = average(beta1, state.get("exp_avg", zeros), gradient)
    distance = Value(gradient.exact - m.exact, largest(gradient.addend, m.addend))
    spread = average(beta2, state.get("exp_avg_var", zeros), square(distance))
    s = Value(spread.exact + eps, largest(spread.addend, eps))
    scale = lr / debias(beta1, t, real) / (np.sqrt(s.exact / debias(beta2, t, real)) + eps)
    delta, decay = scale * m.exact, lr * real(h["weight_decay"]) * p
    addend = largest(p, decay, delta, scale * m.addend, delta * share(s))
    return {"param": Value(p - delta - decay, addend), "exp_avg": m, "exp_avg_var": s}


VARIANCE = Bound(
    18.0,
    "g − m: 4.4 of m and the difference 1; the square doubles them and adds 1: 11.8. Constant, difference and product "
    "of the average 3·(1 + 1/99), its sum 1; ε and its sum 2: 17.8.",
)
STEP = Bound(
    23.0,
    "As Adam's, with half of s's 18 u, weighed by the share of its addends: 9; the root 1, C and its product 2, the "
    "sum with ε 1, division 1, A and its product 2, m's 4.4, the sum with the decay 1, the last 1: 22.4.",
    extra64=BIAS_64.ulps,
)
VALUES = {"exp_avg": MOMENT, "exp_avg_var": VARIANCE, "param": STEP}

ORACLE = Oracle(
    rule="adabelief",
    defaults=dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0, maximize=False),
    step=step,
    configurations=(
        Configuration("adabelief", "plain", dict(eps=1e-8)),
        Configuration("adabelief", "weight decay", dict(eps=1e-8, weight_decay=0.1, maximize=True)),
    ),
    bounds={"plain": VALUES, "weight decay": VALUES},
)
