"""Oracle of Lion.

Chen, Liang, Huang, Real, Wang, Pham, Dong, Luong, Hsieh, Lu, Le (2023), "Symbolic Discovery of Optimization
Algorithms", Algorithm 2: the sign of one average of the gradients moves the parameter, another average is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import MOMENT, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, largest


def doubt(c: Value) -> np.ndarray:
    """1 where fp32 knows the sign of c; where terms cancel to a millionth, 16 times what the cancellation costs.

    16: a c that is wrong by 8.8 u of its largest term may have the wrong sign, and its step the error 2·lr.
    """
    ratio = c.addend / np.abs(c.exact)
    return np.where(ratio > 2.0**20, 16 * ratio, 1)


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """c ← β₁·m + (1 − β₁)·g;  θ ← θ − η·(sign(c) + λ·θ);  m ← β₂·m + (1 − β₂)·g."""
    real = p.dtype.type
    lr, beta1, beta2 = real(h["lr"]), *h["betas"]
    gradient = coupled_gradient({**h, "weight_decay": 0.0}, p, g)
    old = state.get("exp_avg", np.zeros_like(p))
    c = average(beta1, old, gradient)
    move, decay = lr * np.sign(c.exact), lr * real(h["weight_decay"]) * p
    new = Value(p - move - decay, largest(p, decay, move, move * doubt(c)))
    return {"param": new, "exp_avg": average(beta2, old, gradient)}


STEP = Bound(
    4.2,
    "p − (lr·sign + lr·λ·p): lr 1, the two sums 1 each, the decay's roundings 2 u of at most 1e-3·S. A sign that "
    "cancellation leaves open costs 2·lr, of which the addend there is at least 1.8/u: 1.1.",
)

VALUES = {"exp_avg": MOMENT, "param": STEP}

ORACLE = Oracle(
    rule="lion",
    defaults=dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False),
    step=step,
    configurations=(
        Configuration("lion", "plain"),
        Configuration("lion", "weight decay", dict(lr=1e-3, weight_decay=0.1)),
    ),
    bounds={"plain": VALUES, "weight decay": VALUES},
)
