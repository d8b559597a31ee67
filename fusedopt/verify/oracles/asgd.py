"""Oracle of ASGD.

Polyak & Juditsky (1992), "Acceleration of Stochastic Approximation by Averaging", with the schedules that
torch.optim.ASGD takes from Bottou's SGD: ηₜ₊₁ = lr/(1 + λ·lr·t)^α, μₜ₊₁ = 1/max(1, t − t₀). Both are kept in fp32 and
used in the next step; η begins as lr, rounded to fp32. Weight decay is the L2 term in the gradient; λ·η·θ decays apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import SCALAR_SLOT, Bound
from ..formats import SINGLE
from ..oracle import Configuration, Oracle, Value, coupled_gradient, largest, number


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """θ ← θ − η·λ·θ − η·g;  ā ← ā + μ·(θ − ā), or θ where μ = 1."""
    real = p.dtype.type
    gradient = coupled_gradient(h, p, g)
    eta, mu = real(state.get("eta", SINGLE.round(np.asarray(h["lr"])))), real(state.get("mu", 1.0))
    moved, decay = eta * gradient.exact, eta * real(h["lambd"]) * p
    new = Value(p - decay - moved, largest(p, decay, moved, eta * gradient.addend))
    mean = new
    if mu != 1:
        old = state["ax"]
        exact = (1 - mu) * old + mu * new.exact
        mean = Value(exact, largest(old, mu * new.exact, mu * new.addend))
    slower = np.longdouble(h["lr"]) / (1 + np.longdouble(h["lambd"]) * h["lr"] * t) ** np.longdouble(h["alpha"])
    return {
        "param": new,
        "ax": mean,
        "eta": number(slower, real),
        "mu": number(1 / max(real(1), t - real(h["t0"])), real),
    }


STEP = Bound(
    4.1,
    "p − (η·g + η·λ·p): η and its product 2; the decay's 3 roundings are of at most 1e-3·p; two sums 2.",
)
MEAN = Bound(
    8.2, "ā + μ·(p − ā): p's 4.1; μ, difference and product 3 of μ·|p − ā| ≤ S + S/28, as μ ≤ 1/28 here; the sum 1."
)
L2_STEP = Bound(7.1, "As plain, 4.1; g + λ·p adds constant, product and sum.")

ORACLE = Oracle(
    rule="asgd",
    defaults=dict(lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0, maximize=False),
    step=step,
    configurations=(
        Configuration("asgd", "plain"),
        Configuration("asgd", "averaging", dict(lambd=1e-2, t0=2.0)),
        Configuration("asgd", "weight decay", dict(weight_decay=0.01, maximize=True)),
    ),
    bounds={
        "plain": {"param": STEP, "ax": STEP, "eta": SCALAR_SLOT, "mu": SCALAR_SLOT},
        "averaging": {"param": STEP, "ax": MEAN, "eta": SCALAR_SLOT, "mu": SCALAR_SLOT},
        "weight decay": {"param": L2_STEP, "ax": L2_STEP, "eta": SCALAR_SLOT, "mu": SCALAR_SLOT},
    },
    scalars=("eta", "mu"),
)
