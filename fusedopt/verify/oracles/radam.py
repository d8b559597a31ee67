"""Oracle of RAdam.

Liu et al. (2020), "On the Variance of the Adaptive Learning Rate and Beyond", Algorithm 2, with what torch.optim.RAdam
documents as its own: rectification above 5 instead of 4, and ε beside √v before its bias correction. Weight decay is
the L2 term in the gradient, or decoupled (λ·lr·θ) with ``decoupled_weight_decay``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import L2_MOMENT, L2_SQUARE, MOMENT, SQUARE, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, debias, largest, share, square


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """θ ← θ − lr·m̂·r·√(1 − β₂ᵗ)/(√v + ε) if ρₜ > 5, else θ − lr·m̂."""
    real, zeros = p.dtype.type, np.zeros_like(p)
    beta1, beta2 = h["betas"]
    lr, decay = real(h["lr"]), real(h["weight_decay"])
    coupled = 0.0 if h["decoupled_weight_decay"] else decay
    gradient = coupled_gradient({**h, "weight_decay": coupled}, p, g)
    m = average(beta1, state.get("exp_avg", zeros), gradient)
    v = average(beta2, state.get("exp_avg_sq", zeros), square(gradient))

    size, weight = _rectification(beta2, t), zeros
    scale = np.full_like(p, lr / debias(beta1, t, real))
    if size is not None:
        scale = scale * real(size) / (np.sqrt(v.exact) + real(h["eps"]))
        weight = share(v)
    delta = scale * m.exact
    decayed = lr * (decay - coupled) * p
    addend = largest(p, decayed, delta, scale * m.addend, delta * weight)
    return {"param": Value(p - delta - decayed, addend), "exp_avg": m, "exp_avg_sq": v}


def _rectification(beta2: float, t: int) -> np.longdouble | None:
    """rₜ·√(1 − β₂ᵗ), or None where the variance is not tractable."""
    beta = np.longdouble(beta2)
    longest = 2 / (1 - beta) - 1
    rho = longest - 2 * t * beta**t / (1 - beta**t)
    if rho <= 5:
        return None
    square = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
    return np.sqrt(square * (1 - beta**t))


RECTIFICATION_64 = 66.0
"""float64 only, in u = 1.1e-16. ρₜ as a quotient of two sums of positive terms, Σ i·βⁱ and Σ βⁱ: 13 doublings at
t = 5000 of 4 roundings each, 52, and 11 through their 1 − Σ; 2.7 below; quotient and difference 2: 68 u. At t = 30
(ρ−4)(ρ−2)/ρ passes on 1.2 of that, its other factors are 12 roundings, and the root halves: 47. Root, 1 − βᵗ's 2.7 in m̂
and half of it in the root beside, products and quotients up to the constant: 10. (2/(1 − β) − 1 − 2tβᵗ/(1 − βᵗ) would
lose 511 u.)"""
STEP = Bound(
    15.0,
    "A·m/(√v + ε). In m 3.34 as for exp_avg, and its sum's u. √v: half of v's 5 u and the root 1; the sum with ε 1; "
    "division 1; two constants and their products, if apart, 4; the last sum 1. Together 14.9.",
    extra64=RECTIFICATION_64,
)
DECOUPLED_STEP = Bound(
    16.0,
    "As plain, and one more rounding of the sum update + decay; the decay's own are 2 u of lr·λ·p, at most 1e-4·p.",
    extra64=RECTIFICATION_64,
)
L2_STEP = Bound(21.0, "As plain; g + λ·p adds 3 through m and 3 as half of 6 through v.", extra64=RECTIFICATION_64)
PLAIN = {"exp_avg": MOMENT, "exp_avg_sq": SQUARE, "param": STEP}

ORACLE = Oracle(
    rule="radam",
    defaults=dict(
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False, maximize=False
    ),
    step=step,
    configurations=(
        Configuration("radam", "plain"),
        Configuration("radam", "weight decay", dict(weight_decay=0.01)),
        Configuration("radam", "decoupled", dict(weight_decay=0.1, decoupled_weight_decay=True, maximize=True)),
    ),
    bounds={
        "plain": PLAIN,
        "weight decay": {"exp_avg": L2_MOMENT, "exp_avg_sq": L2_SQUARE, "param": L2_STEP},
        "decoupled": {**PLAIN, "param": DECOUPLED_STEP},
    },
)
