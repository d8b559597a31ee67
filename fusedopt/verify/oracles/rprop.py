"""Oracle of Rprop.

Riedmiller & Braun (1993), "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm", in the
form that torch.optim.Rprop documents: where the sign changes, the gradient counts as zero and no step is taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import Bound
from ..oracle import Configuration, Oracle, Value, largest


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """Δ ← clip(Δ·(η⁺ if g·g₋ > 0, η⁻ if g·g₋ < 0, else 1));  g ← 0 if g·g₋ < 0;  p ← p − sign(g)·Δ."""
    real = p.dtype.type
    g = -g if h["maximize"] else g
    turned = np.sign(g) * np.sign(state.get("prev", np.zeros_like(p)))
    shrink, grow = (real(eta) for eta in h["etas"])
    low, high = (real(size) for size in h["step_sizes"])
    factor = np.where(turned > 0, grow, np.where(turned < 0, shrink, real(1)))
    size = np.clip(state.get("step_size", np.full_like(p, h["lr"])) * factor, low, high)
    used = np.where(turned < 0, real(0), g)
    delta = np.sign(used) * size
    return {
        "param": Value(p - delta, largest(p, delta)),
        "prev": Value(used, np.abs(used)),
        "step_size": Value(size, size),
    }


PREVIOUS = Bound(0.0, "The gradient itself, or zero: nothing is rounded.")
SIZE = Bound(2.0, "Δ·η: constant and product; the bounds of the clipping are constants, 1.")
STEP = Bound(3.0, "p − sign(g)·Δ: Δ's 2, the sign nothing, the sum 1.")
BOUNDS = {"prev": PREVIOUS, "step_size": SIZE, "param": STEP}

ORACLE = Oracle(
    rule="rprop",
    defaults=dict(lr=1e-2, etas=(0.5, 1.2), step_sizes=(1e-6, 50.0), maximize=False),
    step=step,
    configurations=(  # the first step size is state: every dtype must hold it exactly
        Configuration("rprop", "plain", dict(lr=2.0**-7)),
        Configuration("rprop", "clipped", dict(lr=2.0**-7, etas=(0.4, 1.5), step_sizes=(4e-3, 1e-2), maximize=True)),
    ),
    bounds={"plain": BOUNDS, "clipped": BOUNDS},
)
