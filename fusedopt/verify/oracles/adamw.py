"""Oracle of AdamW.

Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization", Algorithm 2, line 12, with torch.optim's meaning of
weight_decay: the decay is λ·lr·θ, so the schedule multiplier of the paper is the learning rate itself. AMSGrad as in
`adam.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import BIAS_64, Bound
from ..oracle import Configuration, Oracle, Value, coupled_gradient, largest
from .adam import DEFAULTS, PLAIN, direction


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """θ ← θ − α·m̂/(√v̂ + ε) − α·λ·θ."""
    delta, new = direction(h, t, coupled_gradient({**h, "weight_decay": 0.0}, p, g), state)
    real = p.dtype.type
    decay = real(h["lr"]) * real(h["weight_decay"]) * p
    return {"param": Value(p - delta.exact - decay, largest(p, delta.addend, decay)), **new}


STEP = Bound(
    16.0,
    "As for Adam, 14.9, and one more rounding of the sum update + decay. The decay's own two roundings are 2 u of "
    "lr·λ·p, at most 1e-3 of p.",
    extra64=BIAS_64.ulps,
)

ORACLE = Oracle(
    rule="adamw",
    defaults={**DEFAULTS, "weight_decay": 0.01},
    step=step,
    configurations=(
        Configuration("adamw", "plain"),
        Configuration("adamw", "amsgrad", dict(amsgrad=True, weight_decay=0.1)),
    ),
    bounds={"plain": {**PLAIN, "param": STEP}, "amsgrad": {**PLAIN, "param": STEP}},
)
