"""Oracle of Adam and AMSGrad.

Kingma & Ba (2015), "Adam: A Method for Stochastic Optimization", Algorithm 1. AMSGrad: Reddi, Kale, Kumar (2018), "On
the Convergence of Adam and Beyond", Algorithm 2, with torch.optim's choice to take the maximum before bias correction.
Weight decay is the L2 term in the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..oracle import Configuration, Oracle, Value, coupled_gradient, largest


def direction(
    h: Mapping[str, Any], t: int, gradient: Value, state: Mapping[str, np.ndarray]
) -> tuple[Value, dict[str, Value]]:
    """lr·m̂/(√v̂ + ε) of Algorithm 1, and the new moments.

    A term of size s in v changes the quotient by its share s/v, which counts where L2 and gradient cancel in v.
    """
    g, zeros = gradient.exact, np.zeros_like(gradient.exact)
    real = g.dtype.type
    beta1, beta2 = (np.longdouble(beta) for beta in h["betas"])
    lr, eps, b1, b2, a1, a2 = (real(x) for x in (h["lr"], h["eps"], beta1, beta2, 1 - beta1, 1 - beta2))

    old_m, old_v = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
    m = Value(b1 * old_m + a1 * g, largest(b1 * old_m, a1 * gradient.addend))
    v = Value(b2 * old_v + a2 * g**2, largest(b2 * old_v, a2 * gradient.addend**2))
    new = {"exp_avg": m, "exp_avg_sq": v}
    if h["amsgrad"]:
        old_max = state.get("max_exp_avg_sq", zeros)
        new["max_exp_avg_sq"] = v = Value(np.maximum(old_max, v.exact), largest(old_max, v.addend))

    bias1, bias2 = real(1 - beta1**t), real(1 - beta2**t)  # in longdouble: 1 − βᵗ loses digits at small t
    scale = lr / bias1 / (np.sqrt(v.exact / bias2) + eps)
    share = np.divide(v.addend, v.exact, out=zeros.copy(), where=v.exact > 0)
    delta = scale * m.exact
    return Value(delta, largest(delta, scale * m.addend, delta * share)), new


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """θ ← θ − α·m̂/(√v̂ + ε), with the L2 term in the gradient."""
    delta, new = direction(h, t, coupled_gradient(h, p, g), state)
    return {"param": Value(p - delta.exact, largest(p, delta.addend)), **new}


DEFAULTS = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False)

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
)
