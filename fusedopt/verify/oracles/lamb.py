"""Oracle of LAMB.

You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer, Hsieh (2020), "Large Batch Optimization for Deep
Learning: Training BERT in 76 minutes", Algorithm 2, with φ(z) = min(max(z, γₗ), γᵤ). Where φ or the norm below is zero
the ratio is 1, as in the authors' code: a layer that begins at zero would never move.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import MOMENT, SQUARE, Bound
from ..oracle import Configuration, Oracle, Value, coupled_gradient, largest, norm
from .adam import direction


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """r = m̂/(√v̂ + ε);  x ← x − η·φ(‖x‖)/‖r + λ·x‖·(r + λ·x), each parameter being a layer.

    An error of ‖r + λ·x‖ moves every element; where r and λ·x cancel it is as large as their norm, not their sum's.
    """
    real = p.dtype.type
    gradient = coupled_gradient({**h, "weight_decay": 0.0}, p, g)
    never = 10**9  # steps after which βᵗ is nothing, so nothing is corrected
    r, new = direction({**h, "lr": 1.0, "amsgrad": False}, t if h["bias_correction"] else never, gradient, state)
    decay = real(h["weight_decay"]) * p
    u = Value(r.exact + decay, largest(r.exact + decay, r.addend, decay))
    low, high = h["phi_range"]
    phi, u_norm = min(max(norm(p), real(low)), real(high)), norm(u.exact)
    scale, spread = real(h["lr"]), real(1)
    if phi > 0 and u_norm > 0:
        scale, spread = scale * phi / u_norm, norm(u.addend) / u_norm
    delta = scale * u.exact
    return {"param": Value(p - delta, largest(p, delta * spread, scale * u.addend)), **new}


STEP = Bound(
    42.0,
    "p − lr·(‖p‖/‖u‖)·u. In u = r + λ·p: r as Adam's step without its last sum and lr, 13.9; λ and its product 2; the "
    "sum 1. ‖u‖ carries the same 16.9 and is rounded once, 1, as ‖p‖, 1; division 1, lr and two products 3; the last "
    "sum 1. Together 40.8.",
    extra64=80.0,
)
"""extra64: sums of squares in float64 are trees at most 64 deep, 33 u in a root; twice, and 4.1 as Adam in u, twice."""

VALUES = {"exp_avg": MOMENT, "exp_avg_sq": SQUARE, "param": STEP}

ORACLE = Oracle(
    rule="lamb",
    defaults=dict(
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.0,
        phi_range=(0.0, np.inf),
        bias_correction=True,
        maximize=False,
    ),
    step=step,
    configurations=(
        Configuration("lamb", "plain"),
        Configuration("lamb", "weight decay", dict(lr=0.01, weight_decay=0.01)),
        Configuration("lamb", "no correction", dict(lr=0.01, bias_correction=False)),
        Configuration("lamb", "phi range", dict(lr=0.01, weight_decay=0.01, phi_range=(0.5, 10.0))),
    ),
    bounds=dict.fromkeys(("plain", "weight decay", "no correction", "phi range"), VALUES),
)
