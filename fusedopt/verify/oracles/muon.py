"""Oracle of Muon.

Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks", Algorithms 1 and 2, in exact arithmetic
where the algorithm runs in bf16; with torch.optim.Muon's buffer, an average. The other ratio: Liu et al. (2025), "Muon
is Scalable for LLM Training", eq. 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import MOMENT, Bound
from ..oracle import Configuration, Oracle, Value, average, largest


def orthogonalise(u: np.ndarray, coefficients: tuple[float, float, float], steps: int, eps: float) -> np.ndarray:
    """X ← u/‖u‖, then X ← a·X + b·(X·Xᵀ)·X + c·(X·Xᵀ)²·X."""
    a, b, c = coefficients
    x = (u if u.shape[0] <= u.shape[1] else u.T) / max(np.sqrt(np.sum(u**2)), u.dtype.type(eps))
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if u.shape[0] <= u.shape[1] else x.T


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """B ← μ·B + (1 − μ)·G;  θ ← θ − η·r·NS(G + μ·(B − G)) − η·λ·θ."""
    real = p.dtype.type
    lr, mu = real(h["lr"]), real(h["momentum"])
    buffer = average(h["momentum"], state.get("momentum_buffer", np.zeros_like(g)), Value(g, np.abs(g)))
    u = (1 - mu) * g + mu * buffer.exact if h["nesterov"] else buffer.exact
    o = orthogonalise(u, h["ns_coefficients"], h["ns_steps"], h["eps"])
    rows, columns = p.shape
    if h["adjust_lr_fn"] == "match_rms_adamw":
        ratio = real(0.2) * np.sqrt(real(max(rows, columns)))
    else:
        ratio = np.sqrt(max(real(1), real(rows) / real(columns)))
    decay = lr * real(h["weight_decay"]) * p
    # terms of the products that make up o reach 1, the largest singular value
    return {
        "momentum_buffer": buffer,
        "param": Value(p - lr * ratio * o - decay, largest(p, decay, np.full_like(p, lr * ratio))),
    }


STEP = Bound(
    6.0,
    "The engine: lr·r, its product and those of the decay 4, their sum 1, the last sum 1. Newton–Schulz in bf16: every "
    "result is rounded by 2⁻⁹ of itself. Of x, whose norm is 1, an element errs by 2⁻⁹/√(rows·columns) rms, which five "
    "steps amplify by at most 3.4445⁵ = 485: 0.02 for the smallest shape here, and 1/8 is six times that.",
    share=1 / 8,
)

ORACLE = Oracle(
    rule="muon",
    defaults=dict(
        lr=1e-3,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        ns_coefficients=(3.4445, -4.775, 2.0315),
        eps=1e-7,
        ns_steps=5,
        adjust_lr_fn=None,
    ),
    step=step,
    configurations=(
        Configuration("muon", "plain"),
        Configuration("muon", "match rms", dict(lr=0.02, momentum=0.9, adjust_lr_fn="match_rms_adamw")),
    ),
    bounds={name: {"momentum_buffer": MOMENT, "param": STEP} for name in ("plain", "match rms")},
    complex=False,
    shapes=((53, 97), (70, 33), (60, 60)),
)
