"""Oracle of AdEMAMix.

Pagliardini, Ablin, Grangier (2024), "The AdEMAMix Optimizer: Better, Faster, Older", Algorithm 1 with the schedulers
of α and β₃ that its section 3 gives; β₃ grows from β₁ so that its half-life is linear in the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bounds import MOMENT, SQUARE, Bound
from ..oracle import Configuration, Oracle, Value, average, coupled_gradient, debias, largest, square


def scheduled(h: Mapping[str, Any], t: int) -> tuple[np.longdouble, np.longdouble]:
    """α(t) = min(t·α/T, α);  β₃(t) = min(exp(ln β₁·ln β₃/((1 − t/T)·ln β₃ + t/T·ln β₁)), β₃)."""
    alpha, (start, _, end) = np.longdouble(h["alpha"]), (np.longdouble(beta) for beta in h["betas"])
    if h["alpha_warmup"]:
        alpha = min(t * alpha / h["alpha_warmup"], alpha)
    if h["beta3_warmup"] and t < h["beta3_warmup"]:
        part = np.longdouble(t) / h["beta3_warmup"]
        end = np.exp(np.log(start) * np.log(end) / ((1 - part) * np.log(end) + part * np.log(start)))
    return alpha, end


def step(
    h: Mapping[str, Any], t: int, p: np.ndarray, g: np.ndarray, state: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """m₁, m₂ and ν average g, g and g² with β₁, β₃(t) and β₂;  θ ← θ − η·((m̂₁ + α(t)·m₂)/(√ν̂ + ε) + λ·θ)."""
    real, zeros = p.dtype.type, np.zeros_like(p)
    alpha, beta3 = scheduled(h, t)
    beta1, beta2, _ = h["betas"]
    gradient = coupled_gradient({**h, "weight_decay": 0.0}, p, g)
    fast = average(beta1, state.get("exp_avg_fast", zeros), gradient)
    slow = average(beta3, state.get("exp_avg_slow", zeros), gradient)
    v = average(beta2, state.get("exp_avg_sq", zeros), square(gradient))

    bias1, bias2 = (debias(beta, t, real) for beta in (beta1, beta2))
    scale = real(h["lr"]) / (np.sqrt(v.exact / bias2) + real(h["eps"]))
    a, b = scale / bias1, scale * real(alpha)
    delta = a * fast.exact + b * slow.exact
    decay = real(h["lr"]) * real(h["weight_decay"]) * p
    addend = largest(p, decay, delta, a * fast.addend, b * slow.addend)
    new = {"exp_avg_fast": fast, "exp_avg_slow": slow, "exp_avg_sq": v}
    return {"param": Value(p - delta - decay, addend), **new}


WARM_64 = 30000.0
"""float64 only: β₃(t) is right to 3 u of 1, and 1 − β₃(t) ≥ 1e-4 keeps that: 3 u·|g − m| is 3e4 u of (1−β₃)|g|."""

STEP = Bound(
    31.0,
    "p − (A·m₁ + α·m₂)/(√ν·C + ε). m₁ 3.34 and its sum 1; m₂ likewise; A, α and their products 4; the sum, at most 2S, "
    "2; half of ν's 5 and the root 3.5; C, product and sum with ε 3; division 1, doubled with these as the quotient is "
    "up to 2S; lr and its product 2; the sum with the decay and the last sum 2. Together 30.8 with half of them at 2S.",
    extra64=7.0,
)
WARM_SLOW = Bound(MOMENT.ulps, MOMENT.why, extra64=WARM_64)
WARM_STEP = Bound(STEP.ulps, STEP.why, extra64=STEP.extra64 + WARM_64)

VALUES = {"exp_avg_fast": MOMENT, "exp_avg_slow": MOMENT, "exp_avg_sq": SQUARE, "param": STEP}

ORACLE = Oracle(
    rule="ademamix",
    defaults=dict(
        lr=1e-3,
        betas=(0.9, 0.999, 0.9999),
        alpha=2.0,
        beta3_warmup=None,
        alpha_warmup=None,
        eps=1e-8,
        weight_decay=0.0,
        maximize=False,
    ),
    step=step,
    configurations=(
        Configuration("ademamix", "plain"),
        Configuration("ademamix", "weight decay", dict(lr=0.01, alpha=5.0, weight_decay=0.1)),
        Configuration("ademamix", "warmup", dict(alpha=5.0, beta3_warmup=3000, alpha_warmup=2000)),
    ),
    bounds={
        "plain": VALUES,
        "weight decay": VALUES,
        "warmup": {**VALUES, "exp_avg_slow": WARM_SLOW, "param": WARM_STEP},
    },
)
