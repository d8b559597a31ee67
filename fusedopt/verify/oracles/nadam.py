"""Oracle of NAdam.

Dozat (2016), "Incorporating Nesterov Momentum into Adam", Algorithm 2 with the schedule of its appendix, as
torch.optim.NAdam documents it: μₜ = β₁·(1 − ½·0.96^(t·ψ)). Πμ is kept in fp32, but this step's product is used as
computed. Weight decay is the L2 term in the gradient, or decoupled (λ·lr·θ) with ``decoupled_weight_decay``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import L2_MOMENT, L2_SQUARE, MOMENT, SCALAR_SLOT, SQUARE, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, debias, largest, number, share, square


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """θ ← θ − lr·((1 − μₜ)/(1 − Πₜ)·g + μₜ₊₁/(1 − Πₜ₊₁)·m)/(√v̂ + ε)."""
    real, zeros = p.dtype.type, np.zeros_like(p)
    beta1, beta2 = h["betas"]
    lr, decay = real(h["lr"]), real(h["weight_decay"])
    coupled = 0.0 if h["decoupled_weight_decay"] else decay
    gradient = coupled_gradient({**h, "weight_decay": coupled}, p, g)
    m = average(beta1, state.get("exp_avg", zeros), gradient)
    v = average(beta2, state.get("exp_avg_sq", zeros), square(gradient))

    now, following = (_momentum(h, n) for n in (t, t + 1))
    product = np.longdouble(state.get("mu_product", 1.0)) * now
    on_gradient, on_moment = real((1 - now) / (1 - product)), real(following / (1 - product * following))
    scale = lr / (np.sqrt(v.exact / debias(beta2, t, real)) + real(h["eps"]))
    new_g, new_m = scale * on_gradient * gradient.exact, scale * on_moment * m.exact
    delta = new_g + new_m
    decayed = lr * (decay - coupled) * p
    addend = largest(
        p, decayed, delta, new_g, new_m, scale * on_gradient * gradient.addend, scale * on_moment * m.addend,
        delta * share(v),
    )  # fmt: skip
    return {
        "param": Value(p - delta - decayed, addend),
        "exp_avg": m,
        "exp_avg_sq": v,
        "mu_product": number(product, real),
    }


def _momentum(h: Mapping[str, Any], t: int) -> np.longdouble:
    """μₜ."""
    decay = np.longdouble(0.96) ** (t * np.longdouble(h["momentum_decay"]))
    return np.longdouble(h["betas"][0]) * (1 - decay / 2)


COEFFICIENTS_64 = 28.7
"""float64 only, in u = 1.1e-16, at the step counts tried: μ errs by 5.6 (its power (2 + 0.82)·2e-16, weighed by
z/(2 − z), and 2 roundings), 1 − μ by 9, Π by 6.6, 1 − Π by 6.4, 1 − Π·μ' by 4.3; with product and division the first
coefficient by 16.4 and the second by 10.9 more than one rounding; half of 1 − β₂ᵗ's 2.7 is 1.4."""
STEP = Bound(
    19.0,
    "(A·g + B·m)/(√v·C + ε). In m 3.34 as for exp_avg, and its sum's u; A, B and their products 4; their sum 1. √v: "
    "half of v's 5 u, and the root 1; C and its product 2; the sum with ε 1; two divisions, if apart, 2. The last sum "
    "1: together 18.9.",
    extra64=COEFFICIENTS_64,
)
DECOUPLED_STEP = Bound(
    20.1,
    "As plain, and one more rounding of the sum update + decay; the decay's own are 2 u of lr·λ·p.",
    COEFFICIENTS_64,
)
L2_STEP = Bound(
    28.0, "As plain; g + λ·p adds 3 through g, 3 through m, and 3 as half of 6 through v.", extra64=COEFFICIENTS_64
)
PLAIN = {"exp_avg": MOMENT, "exp_avg_sq": SQUARE, "mu_product": SCALAR_SLOT, "param": STEP}

ORACLE = Oracle(
    rule="nadam",
    defaults=dict(
        lr=2e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        momentum_decay=4e-3,
        decoupled_weight_decay=False,
        maximize=False,
    ),
    step=step,
    configurations=(
        Configuration("nadam", "plain"),
        Configuration("nadam", "weight decay", dict(weight_decay=0.01)),
        Configuration("nadam", "decoupled", dict(weight_decay=0.1, decoupled_weight_decay=True, maximize=True)),
    ),
    bounds={
        "plain": PLAIN,
        "weight decay": {**PLAIN, "exp_avg": L2_MOMENT, "exp_avg_sq": L2_SQUARE, "param": L2_STEP},
        "decoupled": {**PLAIN, "param": DECOUPLED_STEP},
    },
    scalars=("mu_product",),
)
