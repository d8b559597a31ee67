"""Oracle of schedule-free SGD.

Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky (2024), "The Road Less Scheduled", eqs. 2–4 with the weights c of
its authors' package, schedulefree 1.4.1 (SGDScheduleFree). The parameter is y; x is not stored and follows from y and
z. Weight decay is the L2 term at y.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import SCALAR_SLOT, Bound
from ..oracle import Configuration, Oracle, Value, coupled_gradient, largest, number


def weights(
    h: Mapping[str, Any], t: int, state: Mapping[str, np.ndarray]
) -> tuple[np.longdouble, np.longdouble, dict[str, Value]]:
    """Warmed-up γ, and c = w/Σw with w = tʳ·(max γ)^weight_lr_power, 0 while that is 0/0."""
    lr = np.longdouble(h["lr"])
    if t <= h["warmup_steps"]:
        lr = lr * t / h["warmup_steps"]
    lr_max = max(lr, np.longdouble(state.get("lr_max", 0.0)))
    weight = np.longdouble(t) ** np.longdouble(h["r"]) * lr_max ** np.longdouble(h["weight_lr_power"])
    total = np.longdouble(state.get("weight_sum", 0.0)) + weight
    c = weight / total if total > 0 else total
    return lr, c, {"weight_sum": number(total, np.longdouble), "lr_max": number(lr_max, np.longdouble)}


def move(beta: float, lr: np.floating, c: np.floating, y: np.ndarray, z: np.ndarray, d: Value) -> dict[str, Value]:
    """z′ = z − γ·d;  x′ = (1 − c)·x + c·z′;  y′ = (1 − β)·z′ + β·x′, where x = (y − (1 − β)·z)/β."""
    real = y.dtype.type
    exact = np.longdouble(beta)
    keep, rest, lr, c = real(exact), real(1 - exact), real(lr), real(c)
    x = (y - rest * z) / keep
    new_z = z - lr * d.exact
    new_x = (1 - c) * x + c * new_z
    mix = (1 - c) * y + c * z
    pull = lr * (1 - keep * (1 - c))  # how far d moves y
    return {
        "param": Value(rest * new_z + keep * new_x, largest(y, c * z, mix, pull * d.exact, pull * d.addend)),
        "z": Value(new_z, largest(z, lr * d.exact, lr * d.addend)),
    }


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """d = ∇f(y) + λ·y, then eqs. 2–4."""
    lr, c, scalars = weights(h, t, state)
    return {**move(h["momentum"], lr, c, p, state.get("z", p), coupled_gradient(h, p, g)), **scalars}


WEIGHTS_64 = 80.0
"""float64 only: tʳ and γ^power by exp and log err by (2 + |ln|)·2e-16 ≤ 20 u each, in w and in Σw."""

AVERAGE_STEP = Bound(
    12.0,
    "y − (c·(y − z) + γ(1 − β(1 − c))·g): c, difference and product 3, of at most 2S: 6; the second constant and its "
    "product 2; the sum, of at most 3S, 3; the last sum 1.",
    extra64=2 * WEIGHTS_64,
)
POINT = Bound(3.0, "z − γ·g: γ and the product 2, the sum 1.")
L2_AVERAGE_STEP = Bound(15.0, "As without L2, 12; g + λ·y 3.", extra64=2 * WEIGHTS_64)
L2_POINT = Bound(6.0, "As without L2, 3; g + λ·y 3.")

SCALARS = {"weight_sum": SCALAR_SLOT, "lr_max": SCALAR_SLOT}
PLAIN = {"param": AVERAGE_STEP, "z": POINT, **SCALARS}
L2 = {"param": L2_AVERAGE_STEP, "z": L2_POINT, **SCALARS}

ORACLE = Oracle(
    rule="schedule_free_sgd",
    defaults=dict(lr=1.0, momentum=0.9, weight_decay=0.0, warmup_steps=0, r=0.0, weight_lr_power=2.0, maximize=False),
    step=step,
    configurations=(
        Configuration("schedule_free_sgd", "plain"),
        Configuration("schedule_free_sgd", "weight decay", dict(lr=0.1, weight_decay=0.01)),
        Configuration(
            "schedule_free_sgd", "warmup", dict(lr=0.1, momentum=0.95, warmup_steps=50, r=0.5, weight_lr_power=1.5)
        ),
    ),
    bounds={"plain": PLAIN, "weight decay": L2, "warmup": PLAIN},
    scalars=("weight_sum", "lr_max"),
)
