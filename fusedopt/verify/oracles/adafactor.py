"""Oracle of Adafactor.

Shazeer & Stern (2018), "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", Algorithm 4 (matrices) and 5
(vectors), with what torch.optim.Adafactor documents as its differences: lr in the place of 10⁻² in the relative step
size, means in the place of sums, ε₁ bounds the mean of R and the root of V̂ and is not added to g², decay by lr·λ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import Bound
from ..oracle import Configuration, Oracle, Value, largest


def _average(old: np.ndarray | None, new: np.ndarray, w: np.floating) -> Value:
    """β̂·old + (1 − β̂)·new, w = 1 − β̂."""
    old = np.zeros_like(new) if old is None else old
    return Value((1 - w) * old + w * new, largest((1 - w) * old, w * new))


def _rms(x: np.ndarray) -> np.floating:
    return np.sqrt(np.mean(x**2)) if x.size else x.dtype.type(0)


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """X ← X − α·Û − lr·λ·X, α = max(ε₂, RMS(X))·ρ, Û = U/max(1, RMS(U)/d), U = G/√V̂.

    A matrix's V̂ follows from what is stored of the new averages; ``stored`` has that where it is something else.
    """
    real = p.dtype.type
    g = -g if h["maximize"] else g
    w = np.longdouble(t) ** np.longdouble(h["beta2_decay"])
    rho = min(real(h["lr"]), 1 / np.sqrt(real(t)))
    eps1, eps2 = (real(eps) for eps in h["eps"])
    new: dict[str, Value] = {}
    if g.ndim > 1:
        new["row_var"] = _average(state.get("row_var"), np.mean(g**2, axis=-1, keepdims=True), real(w))
        new["col_var"] = _average(state.get("col_var"), np.mean(g**2, axis=-2, keepdims=True), real(w))
        rows, columns = (h["stored"].get(key, new[key].exact) for key in ("row_var", "col_var"))
        v = rows * columns / np.maximum(np.mean(rows, axis=-2, keepdims=True), eps1)
    else:
        new["variance"] = _average(state.get("variance"), g**2, real(w))
        v = new["variance"].exact
    u = g / np.maximum(np.sqrt(v), eps1)
    alpha = np.maximum(eps2, _rms(p)) * rho
    delta = alpha / np.maximum(real(1), _rms(u) / real(h["d"])) * u
    decay = real(h["lr"]) * real(h["weight_decay"]) * p
    return {"param": Value(p - delta - decay, largest(p, delta, decay)), **new}


EPS = (2.0**-20, 1e-3)
"""torch's default of ε₁ depends on the dtype, of which an oracle knows nothing."""
AVERAGE = Bound(
    5.0,
    "Sums are fp64, so a mean is right to 1e-15 and the average, fp64 as well, is rounded once: 1 ulp of a sum that is "
    "at most twice the largest addend. A vector's takes the square 1, constant, difference and product 3, the sum 1.",
    extra64=16.0,
)
STEP = Bound(
    18.0,
    "In V the rows' and columns' last roundings 2 (a vector's average 5), the mean's quotient and the product 2: half "
    "of 7 in its root, 3.5. The root 1, the quotient U 1. Both norms and √n 3 each, half an ulp; α's products and "
    "quotient 5: 6.5 with roundings to fp32. Step size times U 1, constant and product of the decay 2, the sum of both "
    "1, the last sum 1.",
    extra64=64.0,
)

ORACLE = Oracle(
    rule="adafactor",
    defaults=dict(lr=1e-2, beta2_decay=-0.8, eps=EPS, d=1.0, weight_decay=0.0, maximize=False, stored={}),
    step=step,
    configurations=(
        Configuration("adafactor", "plain", dict(eps=EPS)),
        Configuration("adafactor", "weight decay", dict(lr=0.05, eps=EPS, weight_decay=0.1, maximize=True)),
    ),
    bounds={
        name: {"row_var": AVERAGE, "col_var": AVERAGE, "variance": AVERAGE, "param": STEP}
        for name in ("plain", "weight decay")
    },
    complex=False,
    stored=True,
    shapes=((53, 97), (130, 70), (3, 40, 30)),
)
