"""Oracle of ADOPT.

Taniguchi, Harada, Minegishi, Oshima, Jeong, Nagahara, Iiyama, Suzuki, Iwasawa, Matsuo (2024), "ADOPT: Modified Adam
Can Converge with Any β₂ with the Optimal Rate", Algorithm 2 and its clip with cₜ = t^¼ (``clip_exp``; None leaves it
out), that t being the step count less 1: the first step only fills v. Weight decay is the authors' code's: L2, or with
``decouple`` as in AdamW from the second step on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import SQUARE, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, largest, square


def normed(gradient: Value, v: np.ndarray, eps: np.floating, limit: np.floating) -> Value:
    """Clip(g/max(√v, ε), c). Far outside the clip only c's own rounding is left."""
    floor = np.maximum(np.sqrt(v), eps)
    x = gradient.exact / floor
    return Value(np.clip(x, -limit, limit), np.where(np.abs(x) > 2 * limit, limit, gradient.addend / floor))


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """v₀ ← g₀²;  m ← β₁·m + (1 − β₁)·Clip(g/max(√v, ε), c);  θ ← θ − α·m;  v ← β₂·v + (1 − β₂)·g²."""
    real, zeros = p.dtype.type, np.zeros_like(p)
    gradient = coupled_gradient({**h, "weight_decay": 0.0} if h["decouple"] else h, p, g)
    if t == 1:
        return {"param": Value(p, np.abs(p)), "exp_avg": Value(zeros, zeros), "exp_avg_sq": square(gradient)}
    old_m, old_v = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
    limit = real(np.inf if h["clip_exp"] is None else np.longdouble(t - 1) ** np.longdouble(h["clip_exp"]))
    m = average(h["betas"][0], old_m, normed(gradient, old_v, real(h["eps"]), limit))
    lr = real(h["lr"])
    decay = lr * real(h["weight_decay"]) * p if h["decouple"] else zeros
    param = Value(p - decay - lr * m.exact, largest(p, decay, lr * m.exact, lr * m.addend))
    return {"param": param, "exp_avg": m, "exp_avg_sq": average(h["betas"][1], old_v, square(gradient))}


CLIP_64 = 8.0
"""float64 only: c = t^¼ by exp and log errs by (2 + ¼·ln t)·2e-16, with t ≤ 5000 7.5 u."""

MOMENT = Bound(
    6.5, "As Adam's exp_avg, 4.4, of x = g/max(√v, ε): root and division 2; c itself is rounded once.", extra64=CLIP_64
)
STEP = Bound(11.0, "p − (lr·m + decay): m 6.5 and its sum 1; lr and its product 2; two sums, 1.1 and 0.", CLIP_64)
L2_MOMENT = Bound(9.5, "As exp_avg without L2, 6.5; g + λ·p 3.", extra64=CLIP_64)
L2_SQUARE = Bound(11.1, "As exp_avg_sq, 5.1; the square doubles the 3 roundings of g + λ·p: 6.")
L2_STEP = Bound(14.0, "As without L2, 11; g + λ·p 3.", extra64=CLIP_64)

VALUES = {"exp_avg": MOMENT, "exp_avg_sq": SQUARE, "param": STEP}

ORACLE = Oracle(
    rule="adopt",
    defaults=dict(
        lr=1e-3, betas=(0.9, 0.9999), eps=1e-6, clip_exp=0.25, weight_decay=0.0, decouple=False, maximize=False
    ),
    step=step,
    configurations=(
        Configuration("adopt", "plain"),
        Configuration("adopt", "no clip", dict(clip_exp=None, eps=0.01)),
        Configuration("adopt", "weight decay", dict(weight_decay=0.01)),
        Configuration("adopt", "decouple", dict(lr=0.01, weight_decay=0.1, decouple=True)),
    ),
    bounds={
        "plain": VALUES,
        "no clip": VALUES,
        "weight decay": {"exp_avg": L2_MOMENT, "exp_avg_sq": L2_SQUARE, "param": L2_STEP},
        "decouple": VALUES,
    },
)
