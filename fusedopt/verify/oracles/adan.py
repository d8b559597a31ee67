"""Oracle of Adan.

Xie, Zhou, Li, Lin, Yan (2022), "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
Algorithm 1, with the weights of the authors' code: its β is 1 − β of the paper, each average is divided by 1 − βᵗ, and
the first difference of gradients is zero. Weight decay is the proximal step of the paper, or with ``no_prox``
decoupled as in AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import MOMENT, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, debias, largest, share, square


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """d = g − g₋₁;  m, v, n average g, d, (g + β₂·d)²;  θ ← (θ − η·(m̂ + β₂·v̂)/(√n̂ + ε))/(1 + λ·η).

    A term of size s in n changes the quotient by its share s/n, which counts where g and β₂·d cancel.
    """
    real, zeros = p.dtype.type, np.zeros_like(p)
    lr, eps, wd = (real(h[key]) for key in ("lr", "eps", "weight_decay"))
    bias1, bias2, bias3 = (debias(beta, t, real) for beta in h["betas"])
    beta1, beta2, beta3 = h["betas"]

    gradient = coupled_gradient({**h, "weight_decay": 0.0}, p, g)
    g = gradient.exact
    last = -state.get("neg_pre_grad", -g)
    d = Value(g - last, largest(g - last, g, last))
    ahead = g + real(beta2) * d.exact
    ahead = Value(ahead, largest(ahead, g, real(beta2) * d.addend))
    m = average(beta1, state.get("exp_avg", zeros), gradient)
    v = average(beta2, state.get("exp_avg_diff", zeros), d)
    n = average(beta3, state.get("exp_avg_sq", zeros), square(ahead))

    scale = lr / (np.sqrt(n.exact / bias3) + eps)
    a, b = scale / bias1, scale * real(beta2) / bias2
    delta = a * m.exact + b * v.exact
    size = largest(delta, a * m.exact, b * v.exact)
    addend = largest(p, size * share(n), size, a * m.addend, b * v.addend)
    moved = (1 - lr * wd) * p - delta if h["no_prox"] else (p - delta) / (1 + lr * wd)
    copy = Value(-g, np.abs(g))
    new = {"exp_avg": m, "exp_avg_diff": v, "exp_avg_sq": n, "neg_pre_grad": copy}
    return {"param": Value(moved, addend), **new}


COPY = Bound(0.0, "The gradient as it came, with the other sign; no rounding.")
DIFF = Bound(5.5, "As exp_avg, with β ≥ 0.92 3.3 and the sum 1; the difference g − g₋₁ 1.")
SQUARE = Bound(
    13.1,
    "As Adam's exp_avg_sq, 5.1, of x = g + β₂·d: d 1, β₂ and its product 2, the sum 1, and twice that in the square.",
)
STEP = Bound(
    39.0,
    "p − (A·m + B·v)/(√n·C + ε), then decay. m 3.4 and its sum 1; v 4.5 and its sum 1; A, B and their products 4; "
    "their sum is at most 2S: 2. Half of n's 13.1 and the root 7.6; C, product and sum with ε 3; division 2, both of "
    "2S; lr and its product 2. Decay: 1 + λ·η or its reciprocal 1, division or product 1, one more difference 2 and "
    "the last sum 1. Together 34.5; the quotient is at most 2S, which doubles what follows the sum where it is.",
    extra64=11.0,
)
"""extra64: 1 − βᵗ errs by 2.7 u, in A, B and half in C, where terms add to 2S."""

VALUES = {"exp_avg": MOMENT, "exp_avg_diff": DIFF, "exp_avg_sq": SQUARE, "neg_pre_grad": COPY, "param": STEP}

ORACLE = Oracle(
    rule="adan",
    defaults=dict(lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, no_prox=False, maximize=False),
    step=step,
    configurations=(
        Configuration("adan", "plain"),
        Configuration("adan", "weight decay", dict(lr=0.01, weight_decay=0.1)),
        Configuration("adan", "no prox", dict(lr=0.01, weight_decay=0.1, no_prox=True)),
    ),
    bounds=dict.fromkeys(("plain", "weight decay", "no prox"), VALUES),
)
