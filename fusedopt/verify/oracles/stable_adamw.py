"""Oracle of StableAdamW.

Wortsman, Dettmers, Zettlemoyer, Morcos, Farhadi, Schmidt (2023), "Stable and low-precision training for large-scale
vision-language models", Algorithm 2: AdamW whose learning rate is divided by max(1, RMS) of g/√u in each parameter,
with u held above ε² there as the paper advises. Bias correction acts on the betas, and weight decay uses the divided
learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import SQUARE, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, largest, square


def debiased(beta: float, t: int) -> np.longdouble:
    """β̂ = β·(1 − βᵗ⁻¹)/(1 − βᵗ)."""
    exact = np.longdouble(beta)
    return exact * (1 - exact ** (t - 1)) / (1 - exact**t)


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """v, u average g, g² with β̂₁, β̂₂;  η = α/max(1, RMS);  θ ← θ − η·λ·θ − η·v/(√u + ε)."""
    real, zeros = p.dtype.type, np.zeros_like(p)
    eps = real(h["eps"])
    gradient = coupled_gradient({**h, "weight_decay": 0.0}, p, g)
    v = average(debiased(h["betas"][0], t), state.get("exp_avg", zeros), gradient)
    u = average(debiased(h["betas"][1], t), state.get("exp_avg_sq", zeros), square(gradient))
    rms = np.sqrt(np.sum(gradient.exact**2 / np.maximum(u.exact, eps**2)) / max(p.size, 1))
    rate = real(h["lr"]) / max(real(1), rms)
    scale = rate / (np.sqrt(u.exact) + eps)
    delta, decay = scale * v.exact, rate * real(h["weight_decay"]) * p
    param = Value(p - decay - delta, largest(p, decay, delta, scale * v.addend))
    return {"param": param, "exp_avg": v, "exp_avg_sq": u}


MOMENT = Bound(
    7.0,
    "Adam's average from its nearer end, at any β̂: constant, difference and product 3 of min(β̂, 1−β̂)(|g| + |v|), "
    "which is at most 2S (at β̂ = ½); the sum 1.",
    extra64=5.4,
)
STEP = Bound(
    27.0,
    "p − η·(v/(√u + ε) + λ·p). v 7 and its sum 1; half of u's 5, the root, the sum with ε and division 5.5; product "
    "with η 1. η = α/max(1, RMS): in RMS half of u's 5, its sum, root and division 5.5, rounded once 1, divided by the "
    "root of n 2; α and division 2. The sum with the decay, whose own errors are 1e-3 of S, and the last sum 2.",
    extra64=45.0,
)
"""extra64: 1 − βᵗ errs by 2.7 u, at 2S in v and half in u and RMS, 8.1; the mean's sum is a tree at most 64 deep."""

VALUES = {"exp_avg": MOMENT, "exp_avg_sq": Bound(SQUARE.ulps, SQUARE.why, extra64=2.8), "param": STEP}

ORACLE = Oracle(
    rule="stable_adamw",
    defaults=dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, maximize=False),
    step=step,
    configurations=(
        Configuration("stable_adamw", "plain", dict(weight_decay=0.0)),
        Configuration("stable_adamw", "weight decay", dict(lr=0.01, weight_decay=0.1)),
    ),
    bounds={"plain": VALUES, "weight decay": VALUES},
)
