"""Oracle of Adadelta.

Zeiler (2012), "ADADELTA: An Adaptive Learning Rate Method", Algorithm 1, with torch.optim.Adadelta's learning rate,
which multiplies the step and is 1 in the paper. Weight decay is the L2 term in the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, largest, share, square


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """v ← ρ·v + (1 − ρ)·g²;  Δ = √(u + ε)/√(v + ε)·g;  u ← ρ·u + (1 − ρ)·Δ²;  p ← p − lr·Δ."""
    real, zeros = p.dtype.type, np.zeros_like(p)
    lr, eps = real(h["lr"]), real(h["eps"])
    gradient = coupled_gradient(h, p, g)
    v = average(h["rho"], state.get("square_avg", zeros), square(gradient))
    u = state.get("acc_delta", zeros)
    inside = Value(v.exact + eps, largest(v.addend, v.exact, eps))
    ratio = np.sqrt((u + eps) / inside.exact)
    delta = ratio * gradient.exact
    change = Value(delta, largest(delta, ratio * gradient.addend, delta * share(inside)))
    return {
        "param": Value(p - lr * delta, largest(p, lr * change.addend)),
        "square_avg": v,
        "acc_delta": average(h["rho"], u, square(change)),
    }


SQUARE = Bound(
    5.4,
    "v + (1−ρ)(g² − v), ρ ≥ 0.9: 1 for the square; constant, difference and product 3·(1 + 1/9) as both are positive; "
    "the sum 1.",
)
STEP = Bound(
    11.0,
    "√(v + ε): half of v's 5 u and of the sum's 1, and 1 for the root, 4. √(u + ε): half of 2 for ε and the sum, and 1 "
    "for the root, 2. The quotient and its product with g 2; lr and its product 2; the last sum 1.",
)
DELTA = Bound(
    21.4, "Δ errs by 8 u (see the step, without lr), its square by twice that and 1; the average adds 4.4 as for v."
)
L2_SQUARE = Bound(11.4, "As square_avg, 5.4; the square doubles the 3 roundings of g + λ·p: 6.")
L2_STEP = Bound(17.0, "As the step, 11; g + λ·p adds 3 directly and half of 6 through v.")
L2_DELTA = Bound(33.4, "As acc_delta, 21.4, with twice the 6 that g + λ·p adds to Δ.")

ORACLE = Oracle(
    rule="adadelta",
    defaults=dict(lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0, maximize=False),
    step=step,
    configurations=(
        Configuration("adadelta", "plain"),
        Configuration("adadelta", "weight decay", dict(lr=0.3, rho=0.95, weight_decay=0.01, maximize=True)),
    ),
    bounds={
        "plain": {"square_avg": SQUARE, "acc_delta": DELTA, "param": STEP},
        "weight decay": {"square_avg": L2_SQUARE, "acc_delta": L2_DELTA, "param": L2_STEP},
    },
)
