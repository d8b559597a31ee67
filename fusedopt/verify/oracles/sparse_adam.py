"""Oracle of SparseAdam, on gradients that touch every row.

torch.optim.SparseAdam's documented formula: Algorithm 1 of Kingma & Ba (2015), "Adam: A Method for Stochastic
Optimization", in the order that its section 2 calls more efficient, so that ε stands beside √v before bias correction.
Rows without a gradient keep everything; that is no arithmetic and not tried here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import BIAS_64, MOMENT, SQUARE, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, debias, largest, share, square


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """θ ← θ − α·√(1 − β₂ᵗ)/(1 − β₁ᵗ)·m/(√v + ε)."""
    real, zeros = p.dtype.type, np.zeros_like(p)
    beta1, beta2 = h["betas"]
    gradient = coupled_gradient({**h, "weight_decay": 0.0}, p, g)
    m = average(beta1, state.get("exp_avg", zeros), gradient)
    v = average(beta2, state.get("exp_avg_sq", zeros), square(gradient))
    size = real(h["lr"]) * np.sqrt(debias(beta2, t, real)) / debias(beta1, t, real)
    scale = size / (np.sqrt(v.exact) + real(h["eps"]))
    delta = scale * m.exact
    return {
        "param": Value(p - delta, largest(p, delta, scale * m.addend, delta * share(v))),
        "exp_avg": m,
        "exp_avg_sq": v,
    }


STEP = Bound(
    13.0,
    "A·m/(√v + ε). In m 3.34 as for exp_avg, and its sum's u. √v: half of v's 5 u and the root 1; the sum with ε 1; "
    "division 1; A and its product 2; the last sum 1. Together 12.9.",
    extra64=BIAS_64.ulps,
)
BOUNDS = {"exp_avg": MOMENT, "exp_avg_sq": SQUARE, "param": STEP}

ORACLE = Oracle(
    rule="sparse_adam",
    defaults=dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, maximize=False),
    step=step,
    configurations=(
        Configuration("sparse_adam", "plain"),
        Configuration("sparse_adam", "maximize", dict(maximize=True)),
    ),
    bounds={"plain": BOUNDS, "maximize": BOUNDS},
    sparse=True,
    complex=False,
)
