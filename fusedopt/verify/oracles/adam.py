"""Oracle of Adam and AMSGrad.

Kingma & Ba (2015), "Adam: A Method for Stochastic Optimization", Algorithm 1. AMSGrad: Reddi, Kale, Kumar (2018), "On
the Convergence of Adam and Beyond", Algorithm 2, with torch.optim's choice to take the maximum before bias correction.
Weight decay is the L2 term in the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import ADAM_STEP, BIAS_64, L2_MOMENT, L2_SQUARE, MOMENT, SQUARE, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, debias, largest, share, square


def direction(
    h: Mapping[str, Any], t: int, gradient: Value, state: Mapping[str, np.ndarray]
) -> tuple[Value, dict[str, Value]]:
    """lr·m̂/(√v̂ + ε) of Algorithm 1, and the new moments.

    A term of size s in v changes the quotient by its share s/v, which counts where L2 and gradient cancel in v.
    """
    zeros = np.zeros_like(gradient.exact)
    real = zeros.dtype.type
    beta1, beta2 = h["betas"]
    m = average(beta1, state.get("exp_avg", zeros), gradient)
    v = average(beta2, state.get("exp_avg_sq", zeros), square(gradient))
    new = {"exp_avg": m, "exp_avg_sq": v}
    if h["amsgrad"]:
        old_max = state.get("max_exp_avg_sq", zeros)
        new["max_exp_avg_sq"] = v = Value(np.maximum(old_max, v.exact), largest(old_max, v.addend))

    root = np.sqrt(v.exact / debias(beta2, t, real))
    scale = real(h["lr"]) / debias(beta1, t, real) / (root + real(h["eps"]))
    delta = scale * m.exact
    return Value(delta, largest(delta, scale * m.addend, delta * share(v))), new


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """θ ← θ − α·m̂/(√v̂ + ε), with the L2 term in the gradient."""
    delta, new = direction(h, t, coupled_gradient(h, p, g), state)
    return {"param": Value(p - delta.exact, largest(p, delta.addend)), **new}


DEFAULTS = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False)

L2_STEP = Bound(
    21.0,
    "As Adam, 15; g + λ·p adds 3 through m, and half of 6 through v, weighed by the share of its addends in v: 3.",
    extra64=BIAS_64.ulps,
)
NEAR_MOMENT = Bound(
    5.3,
    "β < 0.5: g − β(g − m). Constant, difference and product 3 of β(|g| + |m|), which at β = 0.3 is at most 1.43 of "
    "the largest addend, 4.3; the sum 1. At β = 0 the product vanishes.",
)
NEAR_STEP = Bound(16.0, "As Adam, 14.9, with 4.3 instead of 3.34 in m.", extra64=BIAS_64.ulps)
PLAIN = {"exp_avg": MOMENT, "exp_avg_sq": SQUARE, "max_exp_avg_sq": SQUARE, "param": ADAM_STEP}
NEAR = {**PLAIN, "exp_avg": NEAR_MOMENT, "param": NEAR_STEP}

ORACLE = Oracle(
    rule="adam",
    defaults=DEFAULTS,
    step=step,
    configurations=(
        Configuration("adam", "plain"),
        Configuration("adam", "amsgrad", dict(amsgrad=True)),
        Configuration("adam", "weight decay", dict(weight_decay=0.01)),
        Configuration("adam", "maximize", dict(maximize=True)),
        Configuration("adam", "beta1 0", dict(betas=(0.0, 0.999))),
        Configuration("adam", "beta1 0.3", dict(betas=(0.3, 0.999))),
    ),
    bounds={
        "plain": PLAIN,
        "amsgrad": PLAIN,
        "maximize": PLAIN,
        "weight decay": {"exp_avg": L2_MOMENT, "exp_avg_sq": L2_SQUARE, "param": L2_STEP},
        "beta1 0": NEAR,
        "beta1 0.3": NEAR,
    },
)
