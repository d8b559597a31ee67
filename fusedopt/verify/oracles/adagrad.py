"""Oracle of Adagrad.

Duchi, Hazan, Singer (2011), "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", Figure 1
with diagonal matrices, and what torch.optim.Adagrad documents as its own: ε outside the root, an initial sum, and a
learning rate lr/(1 + (t − 1)·lr_decay). Weight decay is the L2 term in the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import Bound
from ..oracle import Configuration, Oracle, Value, coupled_gradient, largest, share, square


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """G ← G + g²;  p ← p − lr/(1 + (t − 1)·η) · g/(√G + ε)."""
    real = p.dtype.type
    gradient = coupled_gradient(h, p, g)
    old = state.get("sum", np.full_like(p, h["initial_accumulator_value"]))
    added = square(gradient)
    total = Value(old + added.exact, largest(old, added.addend))
    lr = real(h["lr"]) / (1 + (t - 1) * real(h["lr_decay"]))
    scale = lr / (np.sqrt(total.exact) + real(h["eps"]))
    delta = scale * gradient.exact
    addend = largest(p, delta, scale * gradient.addend, delta * share(total))
    return {"param": Value(p - delta, addend), "sum": total}


SUM = Bound(2.0, "G + g²: the square 1, the sum 1.")
STEP = Bound(
    7.0,
    "√G: half of G's 2 u and 1 for the root; the sum with ε 1 (its constant is part of the 2 u before it); division 1; "
    "the learning rate and its product 2; the last sum 1.",
    extra64=2.0,  # (t − 1)·η and 1 + … are rounded in float64 as well
)
L2_SUM = Bound(8.0, "As the sum, 2; the square doubles the 3 roundings of g + λ·p: 6.")
L2_STEP = Bound(13.0, "As the step, 7; g + λ·p adds 3 directly and half of 6 through G.", extra64=2.0)

ORACLE = Oracle(
    rule="adagrad",
    defaults=dict(lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10, maximize=False),
    step=step,
    configurations=(
        Configuration("adagrad", "plain"),
        Configuration("adagrad", "weight decay", dict(weight_decay=0.01, maximize=True)),
        # every dtype holds the initial value exactly
        Configuration("adagrad", "lr decay", dict(lr_decay=0.01, initial_accumulator_value=0.125)),
    ),
    bounds={
        "plain": {"sum": SUM, "param": STEP},
        "weight decay": {"sum": L2_SUM, "param": L2_STEP},
        "lr decay": {"sum": SUM, "param": STEP},
    },
)
