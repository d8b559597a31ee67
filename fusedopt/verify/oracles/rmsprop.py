"""Oracle of RMSprop, centred or not, with momentum or not.

Hinton, Srivastava, Swersky (2012), "Neural Networks for Machine Learning", lecture 6e; centred: Graves (2013),
"Generating Sequences With Recurrent Neural Networks", eqs. 38–41. As torch.optim.RMSprop documents, ε stands outside
the root and the learning rate multiplies the buffer. Weight decay is the L2 term in the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import L2_SQUARE, SQUARE, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, largest, share, square


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """v ← α·v + (1 − α)·g²;  a ← α·a + (1 − α)·g;  q = g/(√(v − a²) + ε);  b ← μ·b + q;  p ← p − lr·b.

    v − a² cancels where gradients agree: its largest term then stands for an error of q by that share of it. Where less
    than 2⁻¹⁶ is left (float16, whose v underflows to zero first) no sign of it is right or wrong: not judged.
    """
    real, zeros = p.dtype.type, np.zeros_like(p)
    gradient = coupled_gradient(h, p, g)
    variance = v = average(h["alpha"], state.get("square_avg", zeros), square(gradient))
    new = {"square_avg": v}
    if h["centered"]:
        new["grad_avg"] = average(h["alpha"], state.get("grad_avg", zeros), gradient)
        mean = square(new["grad_avg"])
        variance = Value(v.exact - mean.exact, largest(v.exact, v.addend, mean.addend))
    scale = 1 / (np.sqrt(variance.exact) + real(h["eps"]))
    q = scale * gradient.exact
    lost = np.abs(variance.exact) < 2.0**-16 * variance.addend
    moved = Value(q, np.where(lost, np.inf, largest(q, scale * gradient.addend, q * share(variance))))
    if h["momentum"] != 0:
        old = real(h["momentum"]) * state.get("momentum_buffer", zeros)
        new["momentum_buffer"] = moved = Value(old + q, largest(old, moved.addend))
    lr = real(h["lr"])
    new["param"] = Value(p - lr * moved.exact, largest(p, lr * moved.exact, lr * moved.addend))
    return new


MEAN = Bound(
    4.1, "a + (1−α)(g − a), α = 0.99: constant, difference and product 3·(1 + 1/99); the sum, of at most 2S, 1."
)
STEP = Bound(
    8.6,
    "√v: half of v's 5 u and 1 for the root; the sum with ε 1; division 1; lr and its product 2; the last sum 1.",
)
BUFFER = Bound(8.6, "q = g/(√v + ε): half of v's 5 u, root, sum and division, 5.5; μ and its product 2; the sum 1.")
BUFFER_STEP = Bound(11.6, "The buffer's 8.6; lr and its product 2; the last sum 1.")
L2_BUFFER = Bound(14.6, "As the buffer, 8.6; g + λ·p adds 3 directly and half of 6 through v.")
L2_BUFFER_STEP = Bound(17.6, "As the step from the buffer, 11.6, with the 6 of g + λ·p.")
CENTERED_STEP = Bound(
    13.7,
    "v − a²: 5.1 for v, 9.1 for a² (twice a's 4.05 and the square), the difference 1. Half of these 15.2 in the root, "
    "and 1 for it; the sum with ε 1; division 1; lr and its product 2; the last sum 1.",
)
CENTERED_BUFFER = Bound(13.7, "q: half of 15.2 (see the centred step), root, sum, division: 10.6; μ·b 2; the sum 1.")
CENTERED_BUFFER_STEP = Bound(16.7, "The centred buffer's 13.7; lr and its product 2; the last sum 1.")

ORACLE = Oracle(
    rule="rmsprop",
    defaults=dict(lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False, maximize=False),
    step=step,
    configurations=(
        Configuration("rmsprop", "plain"),
        Configuration("rmsprop", "momentum", dict(momentum=0.9)),
        Configuration("rmsprop", "weight decay", dict(momentum=0.9, weight_decay=0.01, maximize=True)),
        Configuration("rmsprop", "centered", dict(centered=True)),
        Configuration("rmsprop", "centered momentum", dict(centered=True, momentum=0.9)),
    ),
    bounds={
        "plain": {"square_avg": SQUARE, "param": STEP},
        "momentum": {"square_avg": SQUARE, "momentum_buffer": BUFFER, "param": BUFFER_STEP},
        "weight decay": {"square_avg": L2_SQUARE, "momentum_buffer": L2_BUFFER, "param": L2_BUFFER_STEP},
        "centered": {"square_avg": SQUARE, "grad_avg": MEAN, "param": CENTERED_STEP},
        "centered momentum": {
            "square_avg": SQUARE,
            "grad_avg": MEAN,
            "momentum_buffer": CENTERED_BUFFER,
            "param": CENTERED_BUFFER_STEP,
        },
    },
)
