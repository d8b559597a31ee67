"""Oracle of schedule-free AdamW.

Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky (2024), "The Road Less Scheduled", Algorithm 1, as its authors'
package schedulefree 1.4.1 (AdamWScheduleFree) runs it: bias correction divides v instead of multiplying γ, and c has
the weights of `schedule_free_sgd.py`. Weight decay is taken at y.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import SQUARE, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, debias, largest, square
from .schedule_free_sgd import SCALARS, WEIGHTS_64, move, weights


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """v ← β₂·v + (1 − β₂)·g²;  d = g/(√(v/(1 − β₂ᵗ)) + ε) + λ·y, then z, x and y as in schedule-free SGD."""
    real = p.dtype.type
    lr, c, scalars = weights(h, t, state)
    beta1, beta2 = h["betas"]
    gradient = coupled_gradient({**h, "weight_decay": 0.0}, p, g)
    v = average(beta2, state.get("exp_avg_sq", np.zeros_like(p)), square(gradient))
    normed = gradient.exact / (np.sqrt(v.exact / debias(beta2, t, real)) + real(h["eps"]))
    decay = real(h["weight_decay"]) * p
    d = Value(normed + decay, largest(normed + decay, normed, decay))
    return {**move(beta1, lr, c, p, state.get("z", p), d), "exp_avg_sq": v, **scalars}


AVERAGE_STEP = Bound(
    24.0,
    "As schedule-free SGD, 12, of d = g/(√v·C + ε) + λ·y: half of v's 5 and the root 3.5; C and its product 2; the "
    "sum with ε 1; division 1; λ and its product 2; the sum 1. Together 22.5.",
    extra64=2 * WEIGHTS_64 + 1.4,
)
POINT = Bound(14.0, "z − γ·d: d 10.5, γ and the product 2, the sum 1.", extra64=1.4)
"""extra64: 1 − β₂ᵗ errs by 2.7 u, half of it in C."""

VALUES = {"param": AVERAGE_STEP, "z": POINT, "exp_avg_sq": SQUARE, **SCALARS}

ORACLE = Oracle(
    rule="schedule_free_adamw",
    defaults=dict(
        lr=0.0025,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        warmup_steps=0,
        r=0.0,
        weight_lr_power=2.0,
        maximize=False,
    ),
    step=step,
    configurations=(
        Configuration("schedule_free_adamw", "plain"),
        Configuration("schedule_free_adamw", "weight decay", dict(weight_decay=0.1)),
        Configuration("schedule_free_adamw", "warmup", dict(warmup_steps=50, r=0.5, weight_lr_power=1.5)),
    ),
    bounds=dict.fromkeys(("plain", "weight decay", "warmup"), VALUES),
    scalars=("weight_sum", "lr_max"),
)
