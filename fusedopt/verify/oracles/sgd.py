"""Oracle of SGD with momentum, dampening and Nesterov's look-ahead.

Sutskever, Martens, Dahl, Hinton (2013), "On the importance of initialization and momentum in deep learning", eqs. 1–4,
with what torch.optim.SGD documents as its differences: the learning rate multiplies the buffer instead of entering it,
the first gradient fills the buffer undampened, and the look-ahead is applied to the gradient instead of the point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import Bound
from ..oracle import Configuration, Oracle, Value, coupled_gradient, largest


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """b ← μ·b + (1 − τ)·g;  d = g + μ·b (Nesterov), b, or g (no momentum);  p ← p − lr·d."""
    real = p.dtype.type
    lr, mu, keep = real(h["lr"]), real(h["momentum"]), real(1) - real(h["dampening"])
    direction = gradient = coupled_gradient(h, p, g)
    new: dict[str, Value] = {}
    if mu != 0:
        buffer = gradient
        if "momentum_buffer" in state:
            old = mu * state["momentum_buffer"]
            buffer = Value(old + keep * gradient.exact, largest(old, keep * gradient.addend))
        new["momentum_buffer"] = direction = buffer
        if h["nesterov"]:
            total = gradient.exact + mu * buffer.exact
            direction = Value(total, largest(total, gradient.addend, mu * buffer.exact, mu * buffer.addend))
    moved = p - lr * direction.exact
    new["param"] = Value(moved, largest(p, lr * direction.exact, lr * direction.addend))
    return new


PLAIN_STEP = Bound(3.0, "p − lr·g: lr and the product 2, the sum 1.")
L2_STEP = Bound(6.0, "g + λ·p: constant, product and sum 3; lr and its product 2, the last sum 1.")
BUFFER = Bound(5.0, "μ·b + (1−τ)·g: two constants and two products 4, the sum 1.")
BUFFER_STEP = Bound(8.0, "p − lr·b: the buffer's 4 and 1 for its sum, lr and its product 2, the last sum 1.")
BUFFER_L2 = Bound(8.0, "As the buffer, 5, with 3 roundings of g + λ·p.")
NESTEROV_STEP = Bound(
    17.0, "d = g + μ·b: the buffer's 8, μ and its product 2, g + λ·p again 3, the sum 1; lr·d 2; the last sum 1."
)

ORACLE = Oracle(
    rule="sgd",
    defaults=dict(lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False),
    step=step,
    configurations=(
        Configuration("sgd", "plain", dict(lr=0.1)),
        Configuration("sgd", "weight decay", dict(lr=0.1, weight_decay=0.01, maximize=True)),
        Configuration("sgd", "momentum", dict(lr=0.1, momentum=0.9)),
        Configuration("sgd", "dampening", dict(lr=0.1, momentum=0.9, dampening=0.3)),
        Configuration("sgd", "nesterov", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)),
    ),
    bounds={
        "plain": {"param": PLAIN_STEP},
        "weight decay": {"param": L2_STEP},
        "momentum": {"momentum_buffer": BUFFER, "param": BUFFER_STEP},
        "dampening": {"momentum_buffer": BUFFER, "param": BUFFER_STEP},
        "nesterov": {"momentum_buffer": BUFFER_L2, "param": NESTEROV_STEP},
    },
)
