"""Oracle of AdamW.

Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization", Algorithm 2, line 12, with torch.optim's meaning of
weight_decay: the decay is λ·lr·θ, so the schedule multiplier of the paper is the learning rate itself. AMSGrad as in
`adam.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..oracle import Configuration, Oracle, Value, coupled_gradient, largest
from .adam import DEFAULTS, direction


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """θ ← θ − α·m̂/(√v̂ + ε) − α·λ·θ."""
    delta, new = direction(h, t, coupled_gradient({**h, "weight_decay": 0.0}, p, g), state)
    real = p.dtype.type
    decay = real(h["lr"]) * real(h["weight_decay"]) * p
    return {"param": Value(p - delta.exact - decay, largest(p, delta.addend, decay)), **new}


ORACLE = Oracle(
    rule="adamw",
    defaults={**DEFAULTS, "weight_decay": 0.01},
    step=step,
    configurations=(
        Configuration("adamw", "plain"),
        Configuration("adamw", "amsgrad", dict(amsgrad=True, weight_decay=0.1)),
    ),
)
